"""The files of deploy/, as far as they can be judged without what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
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
