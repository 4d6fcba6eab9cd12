# shellcheck shell=bash
# Sourced by the verbs. `use_venv FILE...` leaves .venv with what the requirement files name, and PYTHON set to its
# interpreter. A stamp per file makes every later call instant.

fail() {
    echo "error: $1" >&2
    exit "${2:-69}"
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is needed and none is on PATH (python3 is: $(python3 --version 2>&1 || true)). \
Install one, for example: apt-get install python3.11 python3.11-venv"
}

install_requirements() {
    local file=$1 venv=${2:-.venv} stamp hash
    stamp=$venv/.installed-$(basename "$file")
    hash=$("$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
    if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then
        return
    fi
    echo "installing $file into $venv (the first time this takes minutes)" >&2
    # DiffDRR names dependencies that its renderer never imports; its file lists the ones that it does.
    local options=()
    [[ $file == *diffdrr* ]] && options=(--no-deps)
    "$PYTHON" -m pip install --disable-pip-version-check "${options[@]}" -r "$file" >&2 ||
        fail "pip could not install $file: see its message above; run the same command again to go on"
    echo "$hash" >"$stamp"
}

use_venv() {
    PYTHON=$PWD/.venv/bin/python
    export PYTHON
    if [[ ! -x .venv/bin/pip ]]; then
        local python
        python=$(find_python) || exit
        "$python" -m venv --clear .venv >&2 ||
            fail "$python cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"
    fi
    local file
    for file in "$@"; do
        install_requirements "$file"
    done
}

# `use_peers` leaves PYTHON set to .venv-peers: what other people made for the same purpose, over the packages of .venv.
use_peers() {
    local site peers=.venv-peers/bin/python
    use_venv requirements.txt requirements-diffdrr.txt
    if [[ ! -x $peers ]]; then
        "$PYTHON" -m venv .venv-peers
        site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "$site" >"$("$peers" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
    fi
    PYTHON=$PWD/$peers
    install_requirements requirements-peers.txt .venv-peers
}
