"""Global settings of Python, torch, numpy and PIL that a script makes at its top and that workers share."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a module.

    Attributes:
        module: that has it. Only what the script has loaded is looked at.
        name: in the module; with the module's it names the setting.
        read, write: of the module; and the value, to write.
        default: what it is in a process that has not touched it, where it is not worth importing the module to learn that.
    """

    module: str
    name: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], Any]
    default: Any = None

    @property
    def key(self) -> str:
        """Names the setting."""
        return f"{self.module}.{self.name}"


def _attribute(module: str, name: str, default: Any = None) -> Setting:
    """A setting that is an attribute, below others if need be."""
    *owners, last = name.split(".")

    def write(owner: Any, value: Any) -> None:
        for one in owners:
            owner = getattr(owner, one)
        setattr(owner, last, value)

    return Setting(module=module, name=name, read=operator.attrgetter(name), write=write, default=default)


def _functions(module: str, read: str, write: str) -> Setting:
    """A setting that is read by one function and written by another one."""
    return Setting(
        module=module,
        name=write,
        read=lambda owner: getattr(owner, read)(),
        write=lambda owner, value: getattr(owner, write)(value),
    )


def _keywords(module: str, read: str, write: str) -> Setting:
    """Settings that are read as a dictionary and written as keyword arguments."""
    return Setting(
        module=module,
        name=write,
        read=lambda owner: dict(getattr(owner, read)()),
        write=lambda owner, value: getattr(owner, write)(**value),
    )


def _read_anomaly(torch: Any) -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _write_anomaly(torch: Any, value: tuple[bool, bool]) -> None:
    torch.autograd.set_detect_anomaly(*value)


def _flushes_denormal(torch: Any) -> bool:
    """Whether numbers too small for full precision are taken for zero: torch tells that to nobody, but the processor does it."""
    return bool(torch.finfo(torch.float64).tiny / 2 == 0.0)


def _start_method(multiprocessing: Any) -> Any:
    return multiprocessing.get_start_method(allow_none=True)


def _set_start_method(multiprocessing: Any, method: str | None) -> None:
    multiprocessing.set_start_method(method, force=True)


def _open_files(resource: Any) -> int:
    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _allow_open_files(resource: Any, number: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, most))


SETTINGS: tuple[Setting, ...] = (
    _functions("sys", "getrecursionlimit", "setrecursionlimit"),
    Setting(module="multiprocessing", name="set_start_method", read=_start_method, write=_set_start_method),
    Setting(module="resource", name="RLIMIT_NOFILE", read=_open_files, write=_allow_open_files),
    _functions("torch", "get_default_dtype", "set_default_dtype"),
    _functions("torch", "get_deterministic_debug_mode", "set_deterministic_debug_mode"),
    _attribute("torch.utils.deterministic", "fill_uninitialized_memory"),
    Setting(
        module="torch", name="set_flush_denormal", read=_flushes_denormal, write=lambda t, v: t.set_flush_denormal(v)
    ),
    Setting(module="torch", name="set_detect_anomaly", read=_read_anomaly, write=_write_anomaly),
    # Precision of float32: the older form first, then what it does not say in the newer one (torch 2.9).
    _attribute("torch.backends.cuda", "matmul.allow_tf32"),
    _functions("torch", "get_float32_matmul_precision", "set_float32_matmul_precision"),
    _attribute("torch.backends.cudnn", "allow_tf32"),
    _attribute("torch.backends", "fp32_precision"),
    _attribute("torch.backends.cuda", "matmul.fp32_precision"),
    *(_attribute("torch.backends.cudnn", f"{part}fp32_precision") for part in ("", "conv.", "rnn.")),
    *(_attribute("torch.backends.mkldnn", f"{part}fp32_precision") for part in ("", "matmul.", "conv.", "rnn.")),
    _attribute("torch.backends.cuda", "matmul.allow_fp16_reduced_precision_reduction"),
    _attribute("torch.backends.cuda", "matmul.allow_bf16_reduced_precision_reduction"),
    _attribute("torch.backends.cuda", "matmul.allow_fp16_accumulation"),
    *(
        _attribute("torch.backends.cudnn", name)
        for name in ("enabled", "benchmark", "benchmark_limit", "deterministic")
    ),
    *(
        _functions("torch.backends.cuda", f"{kernel}_sdp_enabled", f"enable_{kernel}_sdp")
        for kernel in ("flash", "mem_efficient", "math", "cudnn")
    ),
    _attribute("torch.backends.mkldnn", "enabled"),
    _attribute("torch.backends.mkldnn", "deterministic"),
    _attribute("torch.backends.opt_einsum", "enabled"),
    _attribute("torch.backends.opt_einsum", "strategy"),
    _attribute("torch.backends.quantized", "engine"),
    _functions("torch.multiprocessing", "get_sharing_strategy", "set_sharing_strategy"),
    _keywords("numpy", "geterr", "seterr"),
    _keywords("numpy", "get_printoptions", "set_printoptions"),
    _attribute("PIL.ImageFile", "LOAD_TRUNCATED_IMAGES", default=False),
    _attribute("PIL.Image", "MAX_IMAGE_PIXELS", default=89478485),
)
"""In the order in which they are written."""


def read_settings() -> dict[str, Any]:
    """What the settings of the modules that are loaded here are, by their keys."""
    found = {}
    for setting in SETTINGS:
        module = sys.modules.get(setting.module)
        if module is None:
            continue
        try:
            value = setting.read(module)
        except (AttributeError, RuntimeError):
            continue  # this version does not have it, or tells it in another form, which is in the list
        if setting.default is None or value != setting.default:
            found[setting.key] = value
    return found


def write_settings(values: Mapping[str, Any]) -> None:
    """Makes the settings here what they were where they were read; those that are so already are left alone."""
    for setting in SETTINGS:
        if setting.key in values:
            module, value = importlib.import_module(setting.module), values[setting.key]
            if setting.read(module) != value:
                setting.write(module, value)


def left_out_settings() -> list[str]:
    """What is set and cannot be carried, as sentences for the user."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_device") or torch.get_default_device().type == "cpu":
        return []
    text = (
        f"torch.set_default_device('{torch.get_default_device()}') does not reach the workers: each rank puts its models and "
        "batches on its own device, self.device in an operator; name the device where you make other tensors"
    )
    return [text]
