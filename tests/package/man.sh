#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks that an installation has a man page of the program and of each of its commands, with every
# option and example of the help, and that groff has no warning for them.
#   man.sh INSTALLED
set -euo pipefail
program=$1/bin/misa pages=$1/share/man/man1

if [ ! -d "$pages" ]; then
  echo "man.sh: expected man pages, for which help2man is needed (scripts/install-deps.sh)" >&2
  exit 1
fi

names=(misa)
for command in $("$program" --help | awk '/^Subcommands:/ {on = 1; next} /^$/ {on = 0} on {print $1}'); do
  names+=("misa-$command")
done
[ ${#names[@]} -gt 1 ]
diff <(printf '%s.1\n' "${names[@]}" | sort) <(cd "$pages" && printf '%s\n' *)

for name in "${names[@]}"; do
  command=${name#misa}
  help=$("$program" ${command:+"${command#-}"} --help)
  text=$(groff -man -Tascii -P-cbou -rLL=1000n "$pages/$name.1")  # so wide that no line is broken
  if groff -man -Tutf8 -ww -z "$pages/$name.1" 2>&1 | grep .; then
    echo "$name.1: expected no warning" >&2
    exit 1
  fi
  { grep -oE '^  (-.,)?--[a-z0-9-]+' <<< "$help"
    sed -nE '/^Example|^Try it/,$s/^  misa /&/p' <<< "$help"
  } | sed 's/^  //' | while read -r line; do
    grep -qF -- "$line" <<< "$text" || { echo "$name.1: expected '$line'" >&2; exit 1; }
  done
done
