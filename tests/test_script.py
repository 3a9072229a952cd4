"""A worker is like the script that made the trainer: its command line, main module, settings, logging and modules."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from failing import CREATORS as CREATORS_HERE
from launched import RUN
from programs import CREATORS, run_program
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import OperatorUseError, TorchTrainer
from torchtrainer.arguments import decide_threads

SETTINGS = """
import argparse, json, os, resource, signal, sys, warnings
import numpy as np
import torch
from PIL import Image, ImageFile

class MyWarning(UserWarning):
    pass

sys.setrecursionlimit(4321)
resource.setrlimit(resource.RLIMIT_NOFILE, (500, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
torch.set_default_dtype(torch.float64)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_float32_matmul_precision("medium")
torch.backends.cudnn.benchmark = True
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.enable_flash_sdp(False)
torch.autograd.set_detect_anomaly(True, check_nan=False)
torch.set_flush_denormal(True)
torch.multiprocessing.set_sharing_strategy("file_system")
np.seterr(over="raise")
Image.MAX_IMAGE_PIXELS = 5
ImageFile.LOAD_TRUNCATED_IMAGES = True
warnings.filterwarnings("error", category=MyWarning)
"""
SEEN = """
def get_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    return parser.parse_args()

def warns():
    try:
        warnings.warn("mine", MyWarning)
    except MyWarning:
        return "error"
    return "shown"

def seen():
    from PIL import Image, ImageFile
    return [
        sys.argv, get_args().lr, sys.modules["__main__"].__file__, __file__, os.getcwd(), sys.path, sys.getrecursionlimit(),
        resource.getrlimit(resource.RLIMIT_NOFILE)[0], str(torch.get_default_dtype()), torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
        torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled(), sys.float_info.min / int("2"),
        torch.multiprocessing.get_sharing_strategy(), np.geterr(), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES,
        warns(), torch.ones(1).dtype == torch.float64,
    ]
"""


def test_settings_made_at_the_top_hold_on_every_rank_and_in_replacements(tmp_path) -> None:
    text = CREATORS + SETTINGS + SEEN
    text += """
def model_creator(config):
    model = torch.nn.Linear(20, 5)
    model.seen = seen()
    return model

def dataset(n, seed):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 20, generator=g), torch.randint(0, 5, (n,), generator=g))

class Kills(TrainingOperator):
    def train_batch(self, batch, info):
        if self.world_rank == 1 and info["global_step"] == 2 and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_batch(batch, info)

def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=get_args().lr)

creators = {**CREATORS, "model_creator": model_creator, "optimizer_creator": optimizer_creator, "num_workers": 3}
with TorchTrainer(**creators, training_operator_cls=Kills, run_dir=None) as trainer:
    print(trainer.train()["num_samples"])
    built = trainer.apply_all_operators(lambda operator: (operator.model.module.seen, torch.get_num_threads()))
print(json.dumps([seen(), *(one for one, _ in built)]), [threads for _, threads in built])
"""
    program = run_program(tmp_path, text, "--lr", "0.5", OMP_NUM_THREADS="5")
    assert program.ended_well(), program.errors
    assert (tmp_path / "killed").exists()
    samples, line = program.output.splitlines()[-2:]
    seen, _, threads = line.rpartition(" [")
    here, *ranks = json.loads(seen)
    assert samples == "64"
    assert here[1] == 0.5
    assert here[0][1:] == ["--lr", "0.5"]
    for rank in ranks:
        assert rank == here
    assert threads == "5, 5, 5]", "the user's variable, not the share of the cores"
    assert program.errors.count("OMP_NUM_THREADS=5 gives 3 processes 5 threads each") == 1


@pytest.mark.parametrize(
    ("wanted", "ranks", "environ", "launched", "threads"),
    [
        ("auto", 1, {"OMP_NUM_THREADS": "3"}, False, 3),
        ("auto", 2, {"OMP_NUM_THREADS": "3,1"}, False, 3),
        ("auto", 2, {"MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, True, 2),
        ("auto", 2, {"OMP_NUM_THREADS": "1"}, False, 1),
        (4, 2, {"OMP_NUM_THREADS": "3"}, False, 4),
        ("auto", 10_000, {"OMP_NUM_THREADS": "many"}, False, 1),
        ("auto", 1, {"OMP_NUM_THREADS": "1"}, True, 1),
    ],
)
def test_the_users_number_of_threads_counts(wanted, ranks, environ, launched, threads) -> None:
    assert decide_threads(wanted, ranks, environ, launched=launched, cores=2)[0] == threads


def test_one_thread_that_a_launcher_sets_for_all_is_not_the_users() -> None:
    cores = len(os.sched_getaffinity(0))
    assert decide_threads("auto", 2, {"OMP_NUM_THREADS": "1"}, launched=True, cores=cores) == (max(1, cores // 2), "")
    assert decide_threads("auto", 1, {"OMP_NUM_THREADS": str(cores)}, launched=False, cores=cores)[1] == ""
    crowded = decide_threads("auto", 2, {"MKL_NUM_THREADS": str(cores)}, launched=False, cores=cores)[1]
    assert crowded.startswith(f"MKL_NUM_THREADS={cores} gives 2 processes {cores} threads each, for {cores} cores")


BY_NAME = """
import functools, multiprocessing, typing
from concurrent.futures import ProcessPoolExecutor

Length = typing.NewType("Length", float)

def length(text):
    return Length(float(len(text)))

@functools.lru_cache(maxsize=None)
def vocabulary(depth=2):
    return vocabulary(depth - 1) if depth else {letter: float(i) for i, letter in enumerate("abcdef")}

@functools.singledispatch
def number(value):
    return float(value)

@number.register
def _(value: str):
    return vocabulary()[value]

class Rows(torch.utils.data.Dataset):
    @functools.cached_property
    def rows(self):
        return [number(letter) for letter in "abcdef"] * 6

    @functools.lru_cache
    def row(self, index):
        return torch.tensor([self.rows[index]])

    def __len__(self):
        return 36

    def __getitem__(self, index):
        return self.row(index), self.row(index)

def data_creator(config):
    texts = ["x" * n for n in range(6)]
    found = []
    for method in config["methods"]:
        with multiprocessing.get_context(method).Pool(1) as pool:
            found.append(pool.map(length, texts))
    with ProcessPoolExecutor(1) as executor:
        found.append(list(executor.map(config["function"], texts)))
    assert found == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * len(found), found
    workers = {"num_workers": 1, "multiprocessing_context": config["loader"]} if config["loader"] else {}
    return DataLoader(Rows(), batch_size=4, **workers)

creators = dict(model_creator=lambda config: torch.nn.Linear(1, 1), data_creator=data_creator,
                optimizer_creator=optimizer_creator, loss_creator=torch.nn.MSELoss, num_workers=2, run_dir=None)
"""


@pytest.mark.parametrize(
    ("methods", "loader", "start"),
    [
        (["fork"], None, None),
        (["forkserver"], "spawn", None),
        pytest.param([None], None, "spawn", marks=pytest.mark.soak),
    ],
)
def test_what_a_worker_pickles_by_name_is_found_without_a_main_guard(tmp_path, methods, loader, start) -> None:
    config = {"methods": methods, "loader": loader}
    text = CREATORS + BY_NAME
    if start:
        text += f"multiprocessing.set_start_method({start!r})\n"
    text += f"""
with TorchTrainer(**creators, config={{**{config!r}, "function": length}}) as trainer:
    print(trainer.train()["num_samples"], trainer.apply_all_workers(lambda: multiprocessing.get_start_method(allow_none=True)))
"""
    program = run_program(tmp_path, text)
    assert program.output.startswith("36 "), program.errors
    assert (f"['{start}', '{start}']" in program.output) == bool(start)


def test_a_trainer_in_a_spawned_process_trains(tmp_path) -> None:
    text = CREATORS + BY_NAME
    text += """
def trains(queue):
    with TorchTrainer(**creators, config={"methods": [], "loader": None, "function": length}) as trainer:
        queue.put(trainer.train()["num_samples"])

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=trains, args=(queue,))
    process.start()
    print(queue.get(timeout=60))
    process.join()
"""
    assert run_program(tmp_path, text).output == "36\n"


MODULES = """
import importlib.util, types
os.makedirs("lib"); os.makedirs("elsewhere"); os.makedirs("outputs")
NET = "import torch\\nclass Net(torch.nn.Linear):\\n    def __init__(self): super().__init__(20, 5)\\n"
for name in ("lib/helper.py", "lib/later.py", "elsewhere/settings.conf", "elsewhere/base.py"):
    open(name, "w").write(f"NAME = {name!r}\\n{NET}")
open("outputs/helper.py", "w").write("raise RuntimeError('another module of that name')")
sys.path.insert(0, "lib")
import helper

def load(name, path, **loader):
    spec = importlib.util.spec_from_file_location(name, os.path.abspath(path), **loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

odd = load("odd_settings", "elsewhere/settings.conf",
           loader=importlib.machinery.SourceFileLoader("odd_settings", os.path.abspath("elsewhere/settings.conf")))
base = load("configs.base", "elsewhere/base.py")
made = sys.modules["made"] = types.ModuleType("made")
exec("COUNT = 3\\nNAME = 'made'\\n" + NET + "def twice(): return 2 * COUNT", made.__dict__)
twice = made.twice

def model_creator(config):
    import later
    import made
    model = [helper, odd, base, later, made][config["which"]].Net()
    model.name = [helper.NAME, odd.NAME, base.NAME, later.NAME, made.NAME, twice()]
    assert sys.modules["__main__"] is main
    return model

import __main__ as main
os.chdir("outputs")
sys.path.append("")
for which in range(5):
    with TorchTrainer(**{**CREATORS, "model_creator": model_creator}, config={"which": which}, run_dir=None) as trainer:
        print(trainer.train(num_steps=1)["batch_count"], trainer.apply_all_operators(lambda op: op.model.module.name)[1],
              trainer.apply_all_operators(lambda op: type(op.model.module).__module__)[1],
              trainer.apply_all_workers(os.getcwd)[1] == os.getcwd())
"""


def test_modules_are_found_where_the_script_has_them(tmp_path) -> None:
    program = run_program(tmp_path, CREATORS + MODULES)
    assert program.ended_well(), program.errors
    names = ["lib/helper.py", "elsewhere/settings.conf", "elsewhere/base.py", "lib/later.py", "made", 6]
    modules = ["helper", "odd_settings", "configs.base", "later", "made"]
    assert program.output.splitlines() == [f"1 {names} {module} True" for module in modules], program.errors


LOGGING = """
import logging, logging.handlers, warnings

class Short(logging.Formatter):
    def format(self, record):
        return f"short {record.name} {record.getMessage()}"

class NoSecrets(logging.Filter):
    def filter(self, record):
        return "secret" not in record.getMessage()

console, file = logging.StreamHandler(), logging.FileHandler("train.log", mode="w")
console.setFormatter(Short())
console.addFilter(NoSecrets())
logging.basicConfig(level=logging.INFO, handlers=[console, file])
logging.getLogger("quiet").setLevel(logging.ERROR)
logging.getLogger("alone").propagate = False
logging.getLogger("alone").addHandler(logging.handlers.RotatingFileHandler("alone.log"))
logging.captureWarnings(True)
logging.getLogger("script").info("from the script")
log = logging.getLogger("script")

class Logs(TrainingOperator):
    def train_epoch(self, iterator, info):
        if self.world_rank == 0:
            log.info("from rank 0")
            log.debug("below the level")
            log.info("a secret")
            logging.getLogger("quiet").warning("too quiet")
            logging.getLogger("alone").error("alone")
            warnings.warn("captured")
        return super().train_epoch(iterator, info)

for _ in range(2):
    with TorchTrainer(**CREATORS, training_operator_cls=Logs, run_dir=None) as trainer:
        trainer.train()
"""


def test_logging_is_set_up_as_in_the_script(tmp_path) -> None:
    program = run_program(tmp_path, CREATORS + LOGGING)
    assert program.ended_well(), program.errors
    assert program.errors.count("[rank 0] short script from rank 0\n") == 2
    assert program.errors.count("[rank 0] short py.warnings ") == 2
    assert program.errors.count("[rank 0] alone\n") == 2, "without its handler, as Python shows what nothing handles"
    for unwanted in ("below the level", "secret", "too quiet"):
        assert unwanted not in program.errors
    lines = (tmp_path / "train.log").read_text().splitlines()
    written = [line for line in lines if line.startswith("INFO:script:")]
    assert written == [
        "INFO:script:from the script",
        *["INFO:script:from rank 0", "INFO:script:a secret"] * 2,
    ], f"the file is appended to, by whoever logs: {lines}"
    told = "torchtrainer: RotatingFileHandler of the logger 'alone' does not reach the workers (several processes cannot rotate"
    assert program.errors.count(told) == 1
    assert "add it there in initialization_hook" in program.errors


def test_a_default_device_is_told_of(capfd) -> None:
    torch.set_default_device("meta")
    try:
        with TorchTrainer(**CREATORS_HERE) as trainer:
            assert trainer.train(num_steps=1)["batch_count"] == 1
    finally:
        torch.set_default_device(None)
    assert "torchtrainer: torch.set_default_device('meta') does not reach the workers" in capfd.readouterr().err


def test_modules_that_a_worker_lacks_are_named_where_building_fails(tmp_path) -> None:
    (tmp_path / "registers.py").write_text("import registry\nregistry.KNOWN['net'] = 1\n")
    (tmp_path / "registry.py").write_text("KNOWN = {}\n")
    text = f"""
{CREATORS}
import registers, registry

def model_creator(config):
    registry.KNOWN["net"]
    return torch.nn.Linear(20, 5)

def hook():
    import registers

creators = {{**CREATORS, "model_creator": model_creator, "run_dir": None}}
with TorchTrainer(**creators, initialization_hook=hook) as trainer:
    print(trainer.train()["num_samples"])
TorchTrainer(**creators)
"""
    program = run_program(tmp_path, text)
    assert program.output == "64\n", program.errors
    assert "KeyError: 'net'" in program.errors
    assert "has imported modules of its own that this worker has not: registers. If one of them" in program.errors
    assert "import it in initialization_hook=..." in program.errors


class Experiment:
    """Keeps its trainer, and has creators for methods."""

    def __init__(self):
        self.trainer, self.all = None, []

    def model(self, config):
        if config.get("use"):
            self.trainer.train()
        return torch.nn.Linear(3, 1)

    def data(self, config):
        assert self.trainer is None or len(self.all) == 1
        x = torch.randn(36, 3)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

    def optimizer(self, model, config):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def make(self, **config):
        return TorchTrainer(
            model_creator=self.model,
            data_creator=self.data,
            optimizer_creator=self.optimizer,
            loss_creator=torch.nn.MSELoss,
            num_workers=2,
            run_dir=None,
            config=config,
        )


def test_an_object_that_keeps_its_trainer_can_make_another_one() -> None:
    experiment = Experiment()
    with experiment.make() as first:
        experiment.trainer, experiment.all = first, [{"trainer": first}]
        with experiment.make() as second:
            assert second.train()["num_samples"] == first.train()["num_samples"] == 36
            assert second.apply_all_workers(lambda: type(experiment.trainer).__name__) == ["AbsentTrainer"] * 2
        with pytest.raises(OperatorUseError, match=r"trainer\.train was used in a worker process"):
            experiment.make(use=True)


CLOSED = f"""
{CREATORS}

class Prints(TrainingOperator):
    def train_epoch(self, iterator, info):
        print("a line")
        print("an error", file=sys.stderr)
        if self.world_rank == 1 and not os.path.exists("killed") and sys.argv[2:]:
            open("killed", "w").close()
            os.kill(os.getpid(), 9)
        return super().train_epoch(iterator, info)

def data_creator(config):
    return DataLoader(dataset(64, 0), batch_size=4, num_workers=1)

creators = {{**CREATORS, "data_creator": data_creator, "training_operator_cls": Prints}}
with TorchTrainer(**creators, use_tqdm=True, run_dir="run") as trainer:
    result = trainer.train()
    trainer.save("state.pt")
open(f"done.{{os.environ.get('RANK', 0)}}", "w").write(str(result["num_samples"]))
"""


@pytest.mark.parametrize(
    "closed",
    [pytest.param(">&-", marks=pytest.mark.soak), pytest.param("2>&-", marks=pytest.mark.soak), "<&- >&- 2>&-"],
)
def test_closed_standard_streams_are_no_hindrance(tmp_path, closed) -> None:
    python = ("sh", "-c", f'exec "$@" {closed}', "sh", sys.executable)
    program = run_program(tmp_path, CLOSED, "x", "kills", python=python)
    assert program.process.returncode == 0, program.errors
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "done.0").read_text() == "64"
    log = tmp_path / "run" / "logs" / "rank_0"
    assert "a line" in (log / "stdout.log").read_text()
    assert "an error" in (log / "stderr.log").read_text()


def test_closed_standard_streams_are_no_hindrance_under_a_launcher(tmp_path) -> None:
    python = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *RUN, "--nproc-per-node", "2")
    program = run_program(tmp_path, CLOSED, python=python)
    assert program.process.returncode == 0
    assert [(tmp_path / f"done.{rank}").read_text() for rank in (0, 1)] == ["64", "64"]


FAILS_FIRST = f"""
{CREATORS}
from torchtrainer import CheckpointConfig

class Fails(TrainingOperator):
    def train_batch(self, batch, info):
        print("a line of start", os.environ["START"], flush=True)
        if os.environ["START"] == "1" and info["global_step"] == 3:
            print("an error of start 1", file=sys.stderr, flush=True)
            raise ValueError("the first start fails")
        if os.environ["START"] == "2" and info["global_step"] == 5:
            os._exit(7)
        return super().train_batch(batch, info)

with TorchTrainer(**CREATORS, training_operator_cls=Fails, run_dir="run", checkpoint=CheckpointConfig(every_steps=1),
                  failure=FailureConfig(max_failures=0)) as trainer:
    print(trainer.train()["num_samples"])
"""


def test_a_run_that_is_started_again_shows_only_what_this_start_writes(tmp_path) -> None:
    first = run_program(tmp_path, FAILS_FIRST, START="1")
    assert "[rank 0] an error of start 1" in first.errors
    second = run_program(tmp_path, FAILS_FIRST, START="2")
    assert "exited with code 7" in second.errors
    assert "[rank 0] a line of start 2" in second.output
    assert "start 1" not in second.output + second.errors
    log = (tmp_path / "run" / "logs" / "rank_0" / "stderr.log").read_text()
    assert "an error of start 1" in log, "the log itself keeps all"
