#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints what serve.py or serve_sglang.py found, and writes it to FOLDER/served.json. Exits with 1
unless all modes passed.

table.py FOLDER ENGINE MODE...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = (
    f"{'mode':<14} {'work':<8} {'rows':>6} {'judged':>6} {'long':>5} {'overlap':>8} {'least':>7} "
    f"{'own/exact':>10} {'misa/exact':>10} {'bound':>6} {'replayed':>8}"
)


def main() -> int:
    folder, engine, modes = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    failed = []
    served = {}
    print(HEAD)
    for mode in modes:
        path = folder / f"{mode}.json"
        if not path.exists():
            failed.append(mode)
            print(f"{mode:<14} no result: see {folder / mode}.log")
            continue
        result = json.loads(path.read_text())
        served[mode] = result
        if result["faults"]:
            failed.append(mode)
        for work in ("prefill", "decode"):
            tally = result[work]
            print(
                f"{mode:<14} {work:<8} {result['counters'].get(f'misa_{work}', 0):>6} "
                f"{tally['rows']:>6} {tally['rows'] - tally['short']:>5} {tally['overlap']:>8.5f} "
                f"{tally['least']:>7.4f} {1 - tally['engine_beside_exact']:>10.5f} "
                f"{1 - tally['misa_beside_exact']:>10.5f} {tally['farthest']:>6.3f} "
                f"{tally['replayed']:>8}"
            )
        times = f"up in {result['up']} s, served in {result['served']} s"
        more = f"cached {result['cached']}, loaded {result['loaded']}, {result['counters']}"
        padding = result["decode"]["padding"]
        print(f"{'':<14} {times}, preempted {result['preempted']}, padding {padding}, {more}")
        if "host_us" in result:
            print(f"{'':<14} host, us a call, median: {result['host_us']}")
        for fault in result["faults"]:
            print(f"{'':<14} FAULT {fault}")
    (folder / "served.json").write_text(json.dumps({"engine": engine, "modes": served}, indent=1))
    print(f"FAIL: {', '.join(failed)}" if failed else "PASS")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
