"""The files of deploy/, as far as they can be judged without what they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
SYSTEMD = DEPLOY / "systemd"
#: systemd.exec(5): each makes a mount namespace, whose mounts nobody outside of it sees.
NAMESPACE = {
    *("BindPaths", "BindReadOnlyPaths", "ExecPaths", "InaccessiblePaths", "MountAPIVFS", "MountFlags", "NoExecPaths"),
    *("PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateNetwork", "PrivateTmp", "PrivateUsers", "ProcSubset"),
    *("ProtectControlGroups", "ProtectHome", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables"),
    *("ProtectHostname", "ProtectProc", "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths", "RootDirectory"),
    *("RootImage", "TemporaryFileSystem", "DynamicUser"),
}
#: Those that leave only the devices that are listed.
DEVICES = {"DeviceAllow", "DevicePolicy", "ProtectClock"}


@pytest.mark.parametrize("unit", sorted(SYSTEMD.iterdir()), ids=lambda path: path.name)
def test_units_keep_the_mount_visible_and_the_devices_usable(unit: Path) -> None:
    lines = [line for line in unit.read_text().splitlines() if line and line[0] not in "#[;"]
    names = {line.partition("=")[0] for line in lines}
    assert {"What", "ExecStart"} & names
    assert not names & (NAMESPACE | DEVICES)


def test_the_image_is_for_nobody_and_the_manifests_give_it_what_it_writes_to() -> None:
    """Its root file system is read-only there: every directory that its environment names is a volume."""
    lines = (DEPLOY / "container" / "Containerfile").read_text().replace("\\\n", "").splitlines()
    last = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert [line for line in last if line.startswith(("USER", "ENTRYPOINT", "ADD"))] == [
        "USER 65534:65534",
        'ENTRYPOINT ["encfs"]',
    ]
    environment = next(line for line in last if line.startswith("ENV "))
    written = [Path(path) for path in re.findall(r"(?:ENCFS_RUNTIME_DIR|XDG_CACHE_HOME)=(\S+)", environment)]
    assert len(written) == 2
    seen = 0
    for file in (DEPLOY / "kubernetes").iterdir():
        for document in yaml.safe_load_all(file.read_text()):
            spec = document.get("spec", {})
            for container in [*spec.get("initContainers", []), *spec.get("containers", [])]:
                if not container["image"].startswith("registry.example/encfs:"):
                    continue
                places = {Path(mount["mountPath"]) for mount in container["volumeMounts"] if not mount.get("readOnly")}
                assert all(places & {path, *path.parents} for path in written), (file.name, container["name"])
                seen += 1
    assert seen == 3
