#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes man pages of the program and of its commands from their --help, with help2man.
#   man.sh MISA_PROGRAM OUTPUT_DIR
set -euo pipefail
program=$1 out=$2
rm -rf "$out"
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# page NAME DESCRIPTION [COMMAND]: help2man runs a file of the page's name. A line of its own for
# each example needs an empty line after it.
page() {
  cat > "$work/$1" <<END
#!/bin/sh
'$program' ${3:-} "\$@" | sed '/^Example\|^Try it/,\$s/^  misa .*/&\\n/'
END
  chmod +x "$work/$1"
  help2man --no-info --version-string "$("$program" --version)" --name "$2" -o "$out/$1.1" "$work/$1"
}

page misa "indexers for sparse attention"
"$program" --help | sed -n '/^Subcommands:/,/^$/s/^  \([a-z]*\)  *\(.*\)/\1 \2/p' |
  while read -r command description; do
    page "misa-$command" "$description" "$command"
  done
