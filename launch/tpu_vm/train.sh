#!/usr/bin/env bash
# rlhfjax launch render tpu-vm instructgpt_1b3 --topology v5p:2x2x2 --run-dir gs://my-bucket/instructgpt_1b3
#
# A run on TPU machines of one's own, without a cluster:
#   ./train.sh create    asks for the machines (queued resources) and waits for them; one that is there is kept
#   ./train.sh run       installs rlhfjax on each worker and starts the run as a service; one that runs is left alone
#   ./train.sh babysit   create, run and watch: machines that were taken away are asked for again, 42 starts again
#   ./train.sh delete    gives the machines back
# ZONE, and PROJECT where gcloud has no default; SPOT=1 for machines that may be taken away.
set -euo pipefail
name=instructgpt-1b3
readonly name zone="${ZONE:?the zone, such as us-east5-a}"
at=(--zone "$zone" ${PROJECT:+--project "$PROJECT"})
runtime="${RUNTIME:-v2-alpha-tpuv5}"
install="${RLHFJAX_INSTALL:-rlhfjax[tpu,gcs,s3]}"

state() { # of the machines: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED …; nothing where there are none
  gcloud compute tpus queued-resources describe "$name" "${at[@]}" --format 'value(state.state)' 2> /dev/null || true
}

create() {
  case "$(state)" in
    ACTIVE) return ;;
    FAILED | SUSPENDED | SUSPENDING) delete ;;
  esac
  if [[ -z "$(state)" ]]; then
    gcloud compute tpus queued-resources create "$name" "${at[@]}" --node-id "$name" \
      --accelerator-type v5p-16 --runtime-version "$runtime" ${SPOT:+--spot}
  fi
  until [[ "$(state)" == ACTIVE ]]; do
    case "$(state)" in
      FAILED | SUSPENDED) echo "$name: no machines" >&2 && return 1 ;;
    esac
    sleep "${POLL:-30}"
  done
}

on_all() { gcloud compute tpus tpu-vm ssh "$name" "${at[@]}" --worker=all --command "$1"; }

# What each worker is told. The service ends with the run's exit code; SIGTERM, also when the machine goes, lets it save.
run() {
  on_all "$(printf 'install=%q\n' "$install" && cat << 'END'
set -eu
if systemctl --quiet is-active rlhfjax; then exit 0; fi
python3 -m pip install --quiet --user uv # the system's Python may be older than rlhfjax takes
test -d ~/rlhfjax-venv || ~/.local/bin/uv venv --quiet --python 3.12 ~/rlhfjax-venv
~/.local/bin/uv pip install --quiet --python ~/rlhfjax-venv/bin/python "$install"
cat > ~/rlhfjax-train << 'SCRIPT'
#!/bin/bash
PATH="$HOME/rlhfjax-venv/bin:$PATH"
rlhfjax doctor instructgpt_1b3 --run-dir gs://my-bucket/instructgpt_1b3 || exit "$?"
exec rlhfjax run instructgpt_1b3 --run-dir gs://my-bucket/instructgpt_1b3
SCRIPT
chmod +x ~/rlhfjax-train
sudo systemctl reset-failed rlhfjax 2> /dev/null || true
sudo systemd-run --unit rlhfjax --uid "$(id -u)" --setenv HOME="$HOME" --remain-after-exit \
  --property TimeoutStopSec=330 ~/rlhfjax-train
END
)"
}

# What the workers ended with: an error that would be the same again (1 to 4), else the highest exit code; "running" while
# one runs, "none" where one has no service, nothing where they do not answer. A signal counts as 128 and its number.
result() {
  on_all 'systemctl show rlhfjax --property LoadState,SubState,ExecMainCode,ExecMainStatus | paste -sd " "' 2> /dev/null |
    awk '
    {
      for (i = 1; i <= NF; i++) { split($i, pair, "="); of[pair[1]] = pair[2] }
      code = of["ExecMainStatus"] + (of["ExecMainCode"] > 1 ? 128 : 0)
      if (of["SubState"] == "running") running = 1
      if (of["LoadState"] == "not-found") none = 1
      if (code >= 1 && code <= 4) final = code
      if (code > most) most = code
      workers++
    }
    END { if (workers) print final ? final : running ? "running" : none ? "none" : most + 0 }'
}

babysit() {
  local stops=0 deaths=0 code
  while :; do
    create || true # what did not work is tried again
    code="$(result)" || true
    case "$code" in
      running | "") ;;
      none) run || true ;;
      0) echo "$name: finished" && return 0 ;;
      1 | 2 | 3 | 4) echo "$name: exit code $code, which would be the same again" >&2 && return "$code" ;;
      *)
        if ((code == 42 ? ++stops > 100 : ++deaths > 3)); then return "$code"; fi
        on_all 'sudo systemctl stop rlhfjax; sudo systemctl reset-failed rlhfjax || true' || true # then all start together
        ;;
    esac
    sleep "${POLL:-30}"
  done
}

delete() { gcloud compute tpus queued-resources delete "$name" "${at[@]}" --force --quiet; }

case "${1:-}" in
  create | run | babysit | delete) "$1" ;;
  *) echo "usage: $0 create|run|babysit|delete" >&2 && exit 2 ;;
esac
