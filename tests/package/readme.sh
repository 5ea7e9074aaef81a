#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks that the README's commands work and that its C++ example is examples/select.cpp but for the
# licence line.
#   readme.sh SOURCE_DIR MISA_PROGRAM EXAMPLE_PROGRAM
set -euo pipefail
source_dir=$1 program=$2 example=$3

# Prints the fenced blocks of one language.
blocks() { awk -v fence="\`\`\`$1" '$0 == "```" {on = 0} on; $0 == fence {on = 1}' "$source_dir/README.md"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

blocks cpp > "$work/example.cpp"
sed '1{/SPDX-License-Identifier/d}' "$source_dir/examples/select.cpp" |
  diff -u - "$work/example.cpp"
"$example" | grep -q '^query 0 attends to positions 0 ... '

# `make …` lines are left out, since make started this test.
blocks sh | grep '^misa ' > "$work/commands"
[ -s "$work/commands" ]
mkdir "$work/bin" "$work/data"
ln -s "$program" "$work/bin/misa"
ln -s "$source_dir"/data/*.safetensors "$work/data/"
cd "$work"
PATH="$work/bin:$PATH" bash -euxo pipefail commands
