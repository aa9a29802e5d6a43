#!/bin/sh
# Both pages on this machine; called by `make ui`, which sets VENV_BIN, MLFLOW_PORT and PREFECT_PORT.
set -eu
mkdir -p mlruns .prefect
export PREFECT_HOME="$PWD/.prefect"
prefect="http://127.0.0.1:$PREFECT_PORT"
mlflow="http://127.0.0.1:$MLFLOW_PORT"
# The page asks the server at this address, which is not the default one on another port.
export PREFECT_SERVER_UI_API_URL="$prefect/api"

stop() {
    trap - INT TERM EXIT
    # A flow looks here for a server; the file must not outlive it.
    rm -f .prefect/server.url
    kill $pids 2>/dev/null || true
    wait
}
pids=""
trap 'stop; exit 0' INT TERM
trap stop EXIT

# One worker and no job runner: two processes and 0.5 GB, where the defaults take fifteen and 2.5 GB.
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "$VENV_BIN/mlflow" server --host 127.0.0.1 --port "$MLFLOW_PORT" --workers 1 \
    --backend-store-uri "sqlite:///$PWD/mlruns/mlflow.db" --artifacts-destination mlruns/artifacts > .prefect/mlflow.log 2>&1 &
pids="$pids $!"
"$VENV_BIN/prefect" server start --host 127.0.0.1 --port "$PREFECT_PORT" > .prefect/prefect.log 2>&1 &
pids="$pids $!"
echo "$prefect/api" > .prefect/server.url

cat <<END

  MLflow   $mlflow
  Prefect  $prefect   (runs started while it is up are shown live)

  They need some seconds to come up; what they say goes to .prefect/mlflow.log and .prefect/prefect.log.
  Ctrl-C stops both.

END
wait
