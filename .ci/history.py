"""The two scripts as they were at an earlier commit."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mdm_tunnel_server.py", "mdm_tunnel_client.py")
VERSION_1 = "dbf19a3"  # 1.0.0


def out_of_history(commit: str, folder: Path) -> Path:
    """Write both into `folder`, which is returned. Raises LookupError, with the reason,
    where the commit is not known."""
    folder.mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        command = ["git", "-C", str(ROOT), "show", "%s:%s" % (commit, script)]
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if found.returncode:
            why = found.stderr.decode(errors="replace").strip()
            why += "\na shallow clone has no history: git fetch --unshallow"
            raise LookupError("no %s of %s: %s" % (script, commit, why))
        (folder / script).write_bytes(found.stdout)
    return folder
