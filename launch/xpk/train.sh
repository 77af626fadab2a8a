#!/usr/bin/env bash
# rlhfjax launch render xpk instructgpt_6b --topology v6e:4x4 --run-dir gs://my-bucket/instructgpt_6b --image registry.example.com/rlhfjax:0.1.0-tpu
#
# Run it where `xpk` is installed and knows the project: CLUSTER=NAME ./train.sh [--zone ZONE …]; what is given goes to
# xpk. The same run is continued by the same command. XPK counts a stop with everything saved (42) as a restart, too.
set -euo pipefail
# shellcheck disable=SC2016
exec xpk workload create \
  --workload instructgpt-6b \
  --cluster "${CLUSTER:?the name of the cluster}" \
  --tpu-type v6e-16 \
  --num-slices 1 \
  --docker-image registry.example.com/rlhfjax:0.1.0-tpu \
  --max-restarts 100 \
  --restart-on-exit-codes 42 \
  --termination-grace-period-seconds 330 \
  --command 'rlhfjax doctor instructgpt_6b --run-dir gs://my-bucket/instructgpt_6b && exec rlhfjax run instructgpt_6b --run-dir gs://my-bucket/instructgpt_6b' \
  "$@"
