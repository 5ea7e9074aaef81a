#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks the sources without running them; `make check` runs all steps.
#   scripts/check.sh [STEP [FILE...]]    by default every step, on all tracked files
#
#   spdx     every source names its licence
#   floors   folders include what CONTRIBUTING.md permits, and its grid of stages matches the tree
#   report   tables and plots of the pages are what bench/results says
#   figures  drawings of the kernels are what scripts/figures.py draws, and essays have their order
#   names    no identifier that the code has left for the field's terms
#   format   clang-format and ruff's formatter have nothing to change
#   python   ruff's linter
#   types    mypy, on the package as a whole
#   tidy     clang-tidy, on the files of src/, cli/ and python/ that clang compiles; the tests are
#            left out, since the expansions of GoogleTest's macros take longer than everything else,
#            and the analyzer gives up on a function after 30,000 states in place of 225,000, which
#            takes a third of the time
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:-all}
given=("${@:2}")

# The tracked files that match these patterns, limited to the given files if there are any.
tracked() {
  if [ ${#given[@]} -eq 0 ]; then
    git ls-files "$@"
  else
    git ls-files "$@" | grep -Fxf <(printf '%s\n' "${given[@]}") || true
  fi
}

# The files that can contain comments, without documents, plots and the template of reports.
sources() {
  tracked ':!*.md' ':!*.html' ':!*.svg' ':!*.json' ':!*.safetensors' ':!*/py.typed' ':!LICENSE' \
    ':!.gitignore' ':!tests/fuzz/corpus' ':!tests/golden/*.txt'
}

spdx() {
  local lacking
  lacking=$(sources | while read -r path; do
    head -n 2 "$path" | grep -q 'SPDX-License-Identifier: Apache-2\.0' || echo "$path"
  done)
  if [ -n "$lacking" ]; then
    printf 'expected SPDX-License-Identifier: Apache-2.0 in the first two lines of\n%s\n' "$lacking" >&2
    return 1
  fi
}

floors() {
  scripts/floors.py
}

report() {
  scripts/venv.sh
  build/venv/bin/python scripts/report.py
}

figures() {
  scripts/venv.sh
  build/venv/bin/python scripts/figures.py
}

names() {
  scripts/names.py
}

format() {
  tracked '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs -r clang-format --dry-run -Werror
  scripts/venv.sh
  tracked '*.py' | xargs -r build/venv/bin/ruff format --quiet --diff
}

python() {
  scripts/venv.sh
  tracked '*.py' | xargs -r build/venv/bin/ruff check --quiet
}

types() {
  scripts/venv.sh
  build/venv/bin/mypy
}

tidy() {
  scripts/venv.sh
  cmake --preset asan >/dev/null
  tracked 'src/*.cpp' 'cli/*.cpp' 'python/*.cpp' | while read -r path; do
    if grep -qF "\"file\": \"$PWD/$path\"" build/asan/compile_commands.json; then echo "$path"; fi
  done | xargs -r -P"$(nproc)" -n1 clang-tidy --quiet -p build/asan --extra-arg=-Xclang \
    --extra-arg=-analyzer-config --extra-arg=-Xclang --extra-arg=max-nodes=30000 2>&1 |
    sed '/ warnings* generated\.$/d'  # counts of warnings in other projects' headers
}

case "$step" in
  all) for each in spdx floors report figures names format python types tidy; do echo "check: $each"; "$each"; done ;;
  spdx | floors | report | figures | names | format | python | types | tidy) "$step" ;;
  sources) sources ;;
  *) echo "check.sh: expected spdx, floors, report, figures, names, format, python, types or tidy, got '$step'" >&2; exit 2 ;;
esac
