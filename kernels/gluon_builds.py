"""Checks of every build of the ``wgmma.sp`` kernel, which relies on two things that no compiler promises.

- The assembly addresses shared memory from the PTX symbol ``global_smem`` on and expects the ring of tokens there
  first.  The destinations of the first copies in the PTX show whether that holds.
- ptxas makes ``wgmma`` synchronous where it cannot prove that registers in flight are left alone, and reports it
  (advisories C7510 to C7519: "Potential Performance Loss: wgmma.mma_async instructions are serialized").  Results
  are still right, but the kernel loses its advantage.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

from slope_compile.kernels import cache_files
from slope_compile.kernels.gluon_configs import WgmmaSp
from slope_compile.log import log

_DEFINITION = re.compile(r"(?:mov|cvt|cvta)\S*\s+(%\w+), (\w+|%\w+);")
_SUM = re.compile(r"(?:add|or)\.\w+\s+(%\w+), (%\w+), (\d+);")
_TMA = re.compile(r"cp\.async\.bulk\.tensor\.\dd\.shared\S*\s*\[\s*(%\w+)(?:\s*\+\s*(\d+))?\s*\]")


def first_copies(ptx: str) -> list[int]:
    """Destinations of the first TMA copies, as offsets in ``global_smem``, up to the first one computed at run time."""
    known = {"global_smem": 0}
    found = []
    for line in ptx.splitlines():
        copy = _TMA.search(line)
        if copy:
            if copy[1] not in known:
                break
            found.append(known[copy[1]] + int(copy[2] or 0))
            continue
        moved, added = _DEFINITION.search(line), _SUM.search(line)
        if moved and moved[2] in known:
            known[moved[1]] = known[moved[2]]
        elif added and added[2] in known:
            known[added[1]] = known[added[2]] + int(added[3])
    return found


def problems(ptx: str, config: WgmmaSp, messages: str) -> list[str]:
    """The reasons why a build must not be used; empty if it may be.

    Args:
        messages: the output of ptxas, see :func:`messages`.
    """
    x, v = config.BM * 128, config.BN * 64
    expected = [at for i in range(config.stages) for at in (i * x, config.stages * x + i * v)]
    found = []
    if "global_smem" not in ptx:
        found.append("the compiler names shared memory otherwise")
    if first_copies(ptx)[: len(expected)] != expected:
        found.append("the ring of tokens does not begin where shared memory does")
    serialized = re.findall(r"C75\d\d|wgmma\.mma_async instructions are serialized", messages)
    if serialized:
        found.append(f"ptxas serializes wgmma ({', '.join(sorted(set(serialized)))})")
    return found


def messages(ptx: str, assembler: str, arch: str) -> str:
    """The output of ptxas for a kernel as in :func:`assemble`, from a file if an earlier process has asked already.

    Triton's own cache holds the machine code and not what ptxas reported.
    """
    found = Path(assembler).stat()
    identity = (arch, assembler, str(found.st_size), str(found.st_mtime_ns))
    path = cache_files.cache_folder() / f"ptxas-{cache_files.key(ptx, *identity)}.json"
    try:
        return str(json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.debug("%s cannot be read (%s); ptxas runs again", path, error)
    said = assemble(ptx, assembler, arch)
    try:
        cache_files.write(path, json.dumps(said))
    except OSError as error:
        log.debug("%s cannot be written (%s); the next process runs ptxas again", path, error)
    return said


def assemble(ptx: str, assembler: str, arch: str) -> str:
    """The output of ptxas for a kernel.  Triton hides it, so ptxas runs a second time.

    Raises:
        subprocess.CalledProcessError: ptxas rejects the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={arch}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr
