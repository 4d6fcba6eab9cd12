# shellcheck shell=bash
# Sourced by the verbs that need a Docker engine, after venv.sh. `use_docker` leaves one that answers: the one that runs,
# or one of its own, which keeps its data in DOCKER_HOME and is stopped when the verb ends.

DOCKER_HOME=${DOCKER_HOME:-/var/tmp/hybrid-vit-cascade-docker}

engine_answers() {
    docker version --format '{{.Server.Version}}' >/dev/null 2>&1
}

install_missing() {
    local missing=() tool
    for tool in "$@"; do
        command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
    done
    if ((${#missing[@]} == 0)); then
        return
    fi
    if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
        fail "these are needed and missing: ${missing[*]}. Install them (as root on Debian or Ubuntu this script does it)"
    fi
    echo "installing ${missing[*]}" >&2
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
    } >/dev/null || fail "apt-get could not install ${missing[*]}: see its message above"
}

stop_engine() {
    kill "$ENGINE_PID" 2>/dev/null || true
    wait "$ENGINE_PID" || true
}

start_engine() {
    [[ $EUID == 0 ]] || fail "no Docker engine answers, and starting one needs root: start yours"
    mkdir -p "$DOCKER_HOME"
    # In a session of its own, so that Ctrl-C lets the tests take their containers down first.
    setsid dockerd --data-root "$DOCKER_HOME/data" --exec-root "$DOCKER_HOME/run" --pidfile "$DOCKER_HOME/dockerd.pid" \
        --host "$DOCKER_HOST" >"$DOCKER_HOME/dockerd.log" 2>&1 &
    ENGINE_PID=$!
    trap stop_engine EXIT
    local tries
    for ((tries = 0; tries < 150; tries++)); do
        engine_answers && return
        kill -0 "$ENGINE_PID" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$DOCKER_HOME/dockerd.log" >&2
    fail "dockerd did not start; its last lines are above, all are in $DOCKER_HOME/dockerd.log"
}

use_docker() {
    # The classic builder is in every engine; BuildKit's client is a plugin that may be missing.
    export DOCKER_BUILDKIT=0
    install_missing dockerd:docker.io docker-compose debootstrap iptables chromium ssh:openssh-client rsync
    if engine_answers; then
        return
    fi
    export DOCKER_HOST=unix://$DOCKER_HOME/docker.sock
    engine_answers || start_engine
}
