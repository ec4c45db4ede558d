"""A throw-away virtual environment that holds TRL, and borrows everything else from the interpreter that runs."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


class CannotInstall(Exception):
    """pip found no such version, or no package index answered."""


def trl_python(version: str, cache: Path) -> Path:
    """Python of an environment with trl==`version`, made in `cache` at the first call.

    Packages that are here already are used from here: nothing is installed beside TRL but what it lacks, and nothing
    at all into the environment that runs this. Raises: CannotInstall.
    """
    here = sysconfig.get_path("purelib")
    place = hashlib.sha256(f"{here} {sys.version}".encode()).hexdigest()[:8]
    folder = cache / f"trl-{version}-{place}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        print(f"installing trl {version} into {folder}", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", folder], check=True)
            query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
            site = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
            # Where this interpreter lives in a virtual environment itself, the new one would not see its packages.
            (site / "borrowed.pth").write_text(here + "\n", encoding="utf-8")
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"trl=={version}"]
            installed = subprocess.run(pip, capture_output=True, text=True)
            if installed.returncode != 0:
                raise CannotInstall(f"pip could not install trl {version}: {installed.stderr.strip()[-500:]}")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return python
