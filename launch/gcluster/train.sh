#!/usr/bin/env bash
# rlhfjax launch render gcluster instructgpt_6b --topology v6e:4x4 --run-dir gs://my-bucket/instructgpt_6b --image registry.example.com/rlhfjax:0.1.0-tpu
#
# Run it where `gcluster` of the Cluster Toolkit (1.106 or newer) is installed: ./train.sh [--cluster NAME …]; what is
# given goes to gcluster. bash, which is the first process there, gives way to the run, so that SIGTERM reaches it.
set -euo pipefail
# shellcheck disable=SC2016
exec gcluster job submit \
  --name instructgpt-6b \
  --image registry.example.com/rlhfjax:0.1.0-tpu \
  --compute-type v6e-16 \
  --topology 4x4 \
  --num-slices 1 \
  --restarts 10 \
  --restart-on-exit-codes 42 \
  --grace-period 330s \
  --command 'rlhfjax doctor instructgpt_6b --run-dir gs://my-bucket/instructgpt_6b && exec rlhfjax run instructgpt_6b --run-dir gs://my-bucket/instructgpt_6b' \
  "$@"
