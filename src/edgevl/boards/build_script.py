"""The script that finishes a compilation on a machine with Pulsar2, and needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from edgevl.axera.integrity import FILES
from edgevl.axera.layout import BOARD_FILE, NOT_BUILT
from edgevl.boards.pulsar2 import BUILT, ENVIRONMENT, MOUNTED, mount
from edgevl.boards.steps import BoardStep

#: The directory of a dry run that has what the script works on; in it, what is moved out when all
#: is done: a directory of files, and last `BOARD_FILE`, which says that the model is whole.
BUILD, MODEL = "build", "model"
#: What `NOT_BUILT` says.
NOT_BUILT_TEXT = """\
This directory is not a board's model yet: its .axmodel files are still to be made.
Run ./build.sh on a machine with Pulsar2; it removes this file when all is done.

此目录还不是开发板模型：.axmodel 文件尚未生成。
请在装有 Pulsar2 的机器上运行 ./build.sh；全部完成后它会删除本文件。
"""

_SCRIPT = """\
#!/bin/sh
# Makes the .axmodel files of this directory with Pulsar2, which needs no EdgeVL.
#
#   PULSAR2=docker:pulsar2:5.1 ./build.sh     with a Docker image
#   PULSAR2=/opt/pulsar2/bin/pulsar2 ./build.sh     with a package
#
# Without PULSAR2 it is {default}. Run one build at a time on a machine: several at once have
# made broken models. What is done stays; the same command goes on after an interruption.
set -eu
PULSAR2=${{PULSAR2:-{default}}}
case $PULSAR2 in
docker:* | /*) ;;
*/*) PULSAR2=$PWD/$PULSAR2 ;;
esac
cd "$(dirname "$0")/{build}"
{exports}

fail() {{
  echo "build.sh: error: $*" >&2
  exit 1
}}

run() {{
  case $PULSAR2 in
  docker:*)
    # As root, as the image is made; what it writes is given back below.
    docker run --rm {docker} "{mount}" "${{PULSAR2#docker:}}" pulsar2 "$@"
    ;;
  *) "$PULSAR2" "$@" ;;
  esac
}}

# own: makes this user the owner of what a container has written.
own() {{
  case $PULSAR2 in
  docker:*)
    [ -z "$(find making ! -user "$(id -u)" 2>/dev/null | head -n 1)" ] ||
      docker run --rm "{mount}" --entrypoint=chown "${{PULSAR2#docker:}}" \\
        -R "$(id -u):$(id -g)" {mounted}
    ;;
  esac
}}

# build NAME ARGUMENT...: runs Pulsar2, which writes into making/NAME.
build() {{
  name=$1
  shift
  [ ! -d "done/$name" ] || return 0
  own
  rm -rf "making/$name"
  mkdir -p "making/$name" logs
  echo "$name: see $PWD/logs/$name.log" >&2
  run "$@" >"logs/$name.log" 2>&1 || grep -q "{built}" "logs/$name.log" || {{
    own
    tail -n 20 "logs/$name.log" >&2
    fail "$name: Pulsar2 failed, see $PWD/logs/$name.log"
  }}
  own
}}

# keep NAME FILE...: what was built is done if all its files are there.
keep() {{
  name=$1
  shift
  [ ! -d "done/$name" ] || return 0
  for file in "$@"; do
    [ -s "making/$name/$file" ] || fail "$name: Pulsar2 has not written $file, see logs/$name.log"
  done
  mv "making/$name" "done/$name"
}}

# contents FILE...: what board.json says of files that were built.
contents() {{
  command -v sha256sum >/dev/null || return 0
  for file in "$@"; do
    size=$(wc -c <"../$file")
    sum=$(sha256sum "../$file")
    printf '  "%s": {{"bytes": %d, "sha256": "%s"}},\\n' "$file" "$size" "${{sum%% *}}"
  done
}}

case $PULSAR2 in
docker:*)
  docker image inspect "${{PULSAR2#docker:}}" >/dev/null ||
    fail "no image ${{PULSAR2#docker:}}: docker load -i the archive of Pulsar2"
  ;;
*) command -v "$PULSAR2" >/dev/null || fail "no program $PULSAR2: set PULSAR2" ;;
esac
exec 9>lock
if command -v flock >/dev/null; then flock -n 9 || fail "is running already"; fi

{builds}
version=$(run version 2>&1 |
  sed -n 's/.*[vV]ersion[^0-9]*\\([0-9][0-9A-Za-z.]*\\).*/\\1/p' | head -n 1)
{moves}
about=$(sed "s/\\"compiler\\": \\"pulsar2\\"/\\"compiler\\": \\"pulsar2 $version\\"/" \\
  {board})
printf '%s\\n' "$about" | while IFS= read -r line; do
  printf '%s\\n' "$line"
  # At the begin of the list, where others follow.
  [ "$line" != ' "{files}": {{' ] || contents {names}
done >../{board}.new
grep -h "cos_sim is:" logs/*.log || true
for file in {model}/*; do
  [ ! -e "$file" ] || mv "$file" ..
done
mv ../{board}.new ../{board}
rm -f ../{marker}
echo "done: $(cd .. && pwd) is a board's model; {build}/ and build.sh can go"
"""


def build_script(steps: Sequence[BoardStep], pulsar2: str | None) -> str:
    """Return the script.

    Args:
        steps: of the compilation; those with arguments of Pulsar2 are left to the script.
        pulsar2: what runs it if the user of the script says nothing: ``docker:IMAGE``, a path, or
            None for the program on PATH.
    """
    default = shlex.quote(pulsar2 or "pulsar2")
    left = [(step, shlex.join(step.files)) for step in steps if step.arguments]
    return _SCRIPT.format(
        build=BUILD,
        default=default,
        exports="\n".join(f"export {name}={value}" for name, value in ENVIRONMENT.items()),
        docker=" ".join([*(f"--env={name}" for name in ENVIRONMENT), f"--workdir={MOUNTED}"]),
        mounted=MOUNTED,
        mount=mount("$PWD").replace('"', r"\""),
        builds="\n".join(
            f"build {step.product} {_lines(step.arguments)}\nkeep {step.product} {files}\n"
            for step, files in left
        ),
        moves="\n".join(
            f"for file in {files}; do\n"
            f'  [ -s "../$file" ] || mv "done/{step.product}/$file" "../$file"\n'
            "done"
            for step, files in left
        ),
        built=BUILT,
        model=MODEL,
        board=BOARD_FILE,
        marker=NOT_BUILT,
        files=FILES,
        names=" ".join(files for _, files in left),
    )


def _lines(command: Sequence[str]) -> str:
    """Return a command line for a POSIX shell, one option a line."""
    lines: list[list[str]] = [[]]
    for argument in command:
        if argument.startswith("--"):
            lines.append([])
        lines[-1].append(argument)
    return " \\\n    ".join(shlex.join(line) for line in lines if line)
