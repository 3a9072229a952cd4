"""Detects from the firmware which cloud this machine belongs to, and which service to poll there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torchtrainer.config import CLOUDS, PreemptionConfig
from torchtrainer.preempt.poller import Source
from torchtrainer.preempt.wake import Wake

DMI_ROOT = Path("/sys/class/dmi/id")
"""Where Linux shows what the firmware says about the machine."""
BASE_URLS = dict.fromkeys(CLOUDS, "http://169.254.169.254")
"""Where each cloud's metadata service answers; no name has to be looked up for it, Google's included."""

_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
"""On every Azure machine, and on no other of the same virtual hardware."""
_GCP_INTERVAL_S = 1.0
"""After a long poll; longer would be time lost of the 30 seconds that a preempted machine has."""


def detect_cloud(dmi_root: Path) -> str | None:
    """Reads which cloud's machine this is: "aws", "azure", "gcp", or None. Nothing is asked over a network.

    Args:
        dmi_root: directory of the firmware's statements, `DMI_ROOT`.
    """
    if any("amazon" in _read(dmi_root / name).lower() for name in ("sys_vendor", "bios_vendor", "bios_version")):
        return "aws"
    if _read(dmi_root / "product_name") == "Google Compute Engine":
        return "gcp"
    if _read(dmi_root / "chassis_asset_tag") == _AZURE_ASSET_TAG:
        return "azure"
    return None


def metadata_sources(
    config: PreemptionConfig, *, stop: Wake, dmi_root: Path, base_urls: Mapping[str, str]
) -> list[Source]:
    """Makes what asks the metadata services that apply.

    Args:
        config: which clouds, how often, for how long.
        stop: ends requests in progress.
        dmi_root: see `detect_cloud`.
        base_urls: address of each cloud's service.
    """
    clouds = config.metadata or ()
    if clouds == "auto":
        found = detect_cloud(dmi_root)
        clouds = () if found is None else (found,)
    if not clouds:
        return []
    from torchtrainer.preempt import (
        aws,
        azure,
        gcp,
    )  # on all other machines, an HTTP client would be loaded for nothing
    from torchtrainer.preempt.metadata import MetadataServer

    sources: list[Source] = []
    for cloud in clouds:
        server = MetadataServer(base_urls[cloud], timeout_s=config.metadata_timeout_s, stop=stop)
        if cloud == "aws":
            sources.append(aws.AwsSource(server, interval_s=config.metadata_every_s))
        elif cloud == "azure":
            sources.append(azure.AzureSource(server, interval_s=config.metadata_every_s))
        else:
            interval_s = min(_GCP_INTERVAL_S, config.metadata_every_s)
            for key, read in (("preempted", gcp.read_preempted), ("maintenance-event", gcp.read_maintenance)):
                sources.append(gcp.GcpSource(server, key=key, read=read, interval_s=interval_s))
    return sources


def _read(path: Path) -> str:
    """What a file says; empty if there is none, or it is not for us."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
