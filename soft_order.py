"""Soft Layer Ordering: Beyond Shared Hierarchies (Meyerson and Miikkulainen, ICLR 2018).

T tasks, each with an encoder E_i and a decoder D_i, are trained jointly; between these all share the same D core layers W_j.
Parallel ordering, the usual one, applies the layers in one order for every task, permuted ordering in a fixed random order
for each. Soft ordering lets each task learn its own: at each depth it mixes the outputs of all layers with learned scalings s,
D^2 numbers a task.

    Eq. 2   y_i = D_i phi W_D .. phi W_1 E_i(x_i)                                                          parallel
    Eq. 3   y_i = D_i phi W_rho_i(D) .. phi W_rho_i(1) E_i(x_i), rho_i a permutation                       permuted
    Eq. 7   y_i^k = sum_j s(i,j,k) phi(W_j y_i^(k-1)), k = 1 .. D, from y_i^0 = E_i(x_i) to D_i(y_i^D)     soft
            s(i, ., k) = softmax over the layers j of free scores, at first all equal
    The loss is the sum over the tasks of the mean loss on a batch of each. Dropout acts on the output of every layer.

    python soft_order.py --dataset synthetic                         12.6 % (parallel order 34.7 %) in 1.5 minutes on a busy CPU
    python soft_order.py --dataset mnist --tasks 10 --max-steps 5000    1.8 % (parallel 2.3 %), mean of 3 seeds of 3 minutes each
    python soft_order.py --dataset uci --seeds 0 1 2 3 4             22.1 % (parallel 26.9 %), 3 minutes a seed

Departures from the paper [P], which is in Keras and has no public code; [?]: what it leaves open, as chosen here:
- PyTorch, with Keras's initial values (Glorot-uniform, biases 0) and defaults of Adam.
- [?] Dropout masks are independent for each task, layer and depth, and spare the identity layer. Batches are drawn with
  replacement. The last evaluation counts; the best one, chosen on test data, is reported under that name only.
- [?] mnist: frozen encoders without bias. random: full batches, 4,000 iterations, O with one sigmoid unit. uci: batch 32, 10,000
  iterations; missing cells become the training part's median; features are scaled by its range, test values clipped to it.
  omniglot: unpadded convolutions (they match [P]'s number of parameters), ink 1, paper 0, splits stratified by character.
- Not here: celeba (Fig. 7), whose second phase alone has RMSProp, and the pictures of a 4 (Table 1).
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
import warnings
from collections import namedtuple
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from common import InputError, Split, ensure_files, hold_out, reading

METHODS = {"soft": "the paper's", "parallel": "one order for all tasks", "permuted": "a random fixed order for each task",
           "single": "core layers of its own for each task"}
# The paper's setting: tasks, width, depth, dropout, batch size (0: all there are), iterations; flags that make no sense there
SETTINGS = {
    "mnist": (10, 64, 4, 0.5, 64, 20000, ["test_fraction", "samples", "activation"]),
    "uci": (10, 32, 4, 0.8, 32, 10000, ["tasks", "samples", "activation"]),
    "omniglot": (50, 53, 4, 0.5, 1, 5000, ["samples", "activation"]),
    "random": (2, 128, 2, 0.0, 0, 4000, ["task_names", "test_fraction"]),
    "synthetic": (6, 8, 3, 0.0, 64, 4000, ["tasks", "task_names", "test_fraction", "samples", "activation"]),
}
# UCI: file in the repository, leading columns to drop, the target's column after that; features, classes, rows (Fig. 5a)
TABLES = {
    "australian": ("statlog/australian/australian.dat", 0, -1, 14, 2, 690),
    "breast-cancer": ("breast-cancer-wisconsin/wdbc.data", 1, 0, 30, 2, 569), "ecoli": ("ecoli/ecoli.data", 1, -1, 7, 8, 336),
    "german": ("statlog/german/german.data-numeric", 0, -1, 24, 2, 1000),
    "heart": ("heart-disease/processed.cleveland.data", 0, -1, 13, 5, 303),
    "hepatitis": ("hepatitis/hepatitis.data", 0, 0, 19, 2, 155), "iris": ("iris/iris.data", 0, -1, 4, 3, 150),
    "pima": ("pima-indians-diabetes/pima-indians-diabetes.data", 0, -1, 8, 2, 768),
    "wine": ("wine/wine.data", 0, 0, 13, 3, 178), "yeast": ("yeast/yeast.data", 1, -1, 8, 10, 1484),
}
ALPHABETS = """Gujarati Sylheti Arcadian Tibetan Old_Church_Slavonic_(Cyrillic) Angelic Malay_(Jawi_-_Arabic) Sanskrit Cyrillic
Anglo-Saxon_Futhorc Syriac_(Estrangelo) Ge_ez Japanese_(katakana) Keble Manipuri Alphabet_of_the_Magi Gurmukhi Korean
Early_Aramaic Atemayar_Qelisayer Tagalog Mkhedruli_(Georgian) Inuktitut_(Canadian_Aboriginal_Syllabics) Tengwar Hebrew N_Ko
Grantha Latin Syriac_(Serto) Tifinagh Balinese Mongolian ULOG Futurama Malayalam Oriya Ojibwe_(Canadian_Aboriginal_Syllabics)
Avesta Kannada Bengali Japanese_(hiragana) Armenian Aurek-Besh Glagolitic Asomtavruli_(Georgian) Greek Braille
Burmese_(Myanmar) Blackfoot_(Canadian_Aboriginal_Syllabics) Atlantean""".split()  # in the paper's order (A.3)
KNOWN = {"mnist": [f"{a}-{b}" for a in range(10) for b in range(a + 1, 10)], "uci": list(TABLES), "omniglot": ALPHABETS}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line, checked, with the defaults that depend on the data set filled in."""
    share, rate, count, seed = number(float, 0, 0.99), number(float, 1e-12), number(int, 1), number(int, 0, 2**32)
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail  # one line, without the usage text
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=SETTINGS, default="mnist", help="digit against digit; ten tables; alphabets; random labels; made up")
    add("--data-root", default="data", metavar="DIR", help="where the data sets are, or are downloaded to")
    add("--tasks", type=count, metavar="N", help="pairs of digits, first alphabets or random tasks (default: 10, 50, 2)")
    add("--task-names", nargs="+", metavar="NAME", help="the tasks themselves: pairs of digits like 3-8, tables or alphabets")
    add("--test-fraction", type=number(float, 1e-6, 0.99), metavar="F", help="share of test samples (default: uci .2, omniglot .1)")
    add("--samples", type=count, metavar="N", help="random: samples of each task (default: 128)")
    add = p.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="soft", help="; ".join(f"{name}: {what}" for name, what in METHODS.items()))
    add("--depth", type=number(int, 1, 99), metavar="D", help="core layers, and depths (default: 4; random 2, synthetic 3)")
    add("--activation", choices=["linear", "relu"], help="random: Fig. 2a, 128 units, or Fig. 2b, 16 units (default: linear)")
    add("--dropout", type=share, metavar="F", help="dropped share of layers' outputs (default: mnist, omniglot .5, uci .8, else 0)")
    add("--identity-layer", action="store_true", help="soft: one more layer to mix, which returns its input (4.4)")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, metavar="N", help="epochs of --epoch-steps iterations (default: as many as make --max-steps)")
    add("--epoch-steps", type=count, default=500, metavar="N", help="iterations between two evaluations")
    add("--max-steps", type=count, metavar="N", help="iterations in all (mnist 20000, uci 10000, omniglot 5000, others 4000)")
    add("--batch-size", type=count, metavar="N", help="samples of each task a step (default: 64, uci 32, omniglot 1, random all)")
    add("--lr", type=rate, default=1e-3, metavar="F", help="learning rate of Adam, for the layers and the scores")
    add("--cuda-graph", action="store_true", help="CUDA: each training step is one graph; not yet run on a GPU")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=seed, default=0, metavar="N", help="of the tasks, the networks, the orders, the batches and dropout")
    add("--seeds", type=seed, nargs="+", metavar="N", help="run these one after another; print mean and 95 %% interval")
    add("--device", default="auto", metavar="NAME", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--out-dir", default="runs", metavar="DIR", help="the run goes to DIR/soft_order-DATASET-METHOD-sSEED")
    add("--resume", action="store_true", help="continue the run in that folder after its last finished epoch")
    add("--plot", action="store_true", help="draw the error as PNG; needs matplotlib")
    add("--analyze", nargs="+", metavar="RUN", help="tell these runs' errors by data set, number of tasks and method")
    args = p.parse_args(argv)
    tasks, args.width, depth, dropout, batch_size, iterations, unused = SETTINGS[args.dataset]
    for name in [*unused, *(["identity_layer"] if args.method != "soft" else [])]:
        if getattr(args, name):
            p.error(f"--{name.replace('_', '-')} is not for --dataset {args.dataset} --method {args.method}")
    if args.tasks and args.task_names:
        p.error("--tasks and --task-names both give the tasks; choose one")
    known = KNOWN.get(args.dataset, [])
    if unknown := set(args.task_names or []) - set(known):
        p.error(f"unknown task {min(unknown)!r} of {args.dataset}; known are {', '.join(known)}")
    args.tasks = len(args.task_names or []) or args.tasks or tasks
    if args.dataset == "omniglot" and args.tasks > len(known):
        p.error(f"Omniglot has {len(known)} alphabets, not {args.tasks}")
    args.task_names = args.task_names or (known[: args.tasks] if args.dataset != "mnist" else None)
    args.activation = args.activation or ("linear" if args.dataset == "random" else "relu")
    args.width = 16 if (args.dataset, args.activation) == ("random", "relu") else args.width
    args.samples, args.test_fraction = args.samples or 128, args.test_fraction or (0.1 if args.dataset == "omniglot" else 0.2)
    args.depth, args.batch_size = args.depth or depth, args.batch_size or batch_size
    args.dropout = dropout if args.dropout is None else args.dropout
    steps = args.epochs * args.epoch_steps if args.epochs else args.max_steps or iterations
    args.max_steps = min(steps, args.max_steps or steps)
    args.epochs = math.ceil(args.max_steps / args.epoch_steps)
    args.metric = "train_error" if args.dataset == "random" else "test_error"  # random labels can only be fitted
    return args


# -------- Networks ------------------------------------------------------------------------------------------------------

class Heads(nn.Module):
    """Dense layers of T tasks as one batched product, or one layer for all of them where the lists have one entry.
    num_inputs, num_outputs: of each task. x (T, B, max(num_inputs)) is zero beyond a task's own features; the result
    (T, B, max(num_outputs)) is -inf beyond its outputs. Weights that belong to no task get no gradient, and stay 0.
    """

    def __init__(self, num_inputs: list[int], num_outputs: list[int]):
        super().__init__()
        tasks, outputs = len(num_inputs), max(num_outputs)
        self.weight, self.bias = (nn.Parameter(torch.zeros(tasks, outputs, *n)) for n in ([max(num_inputs)], []))
        for weight, fan_in, fan_out in zip(self.weight.detach(), num_inputs, num_outputs, strict=True):
            nn.init.xavier_uniform_(weight[:fan_out, :fan_in])
        self.register_buffer("beyond", torch.arange(outputs) >= torch.tensor(num_outputs)[:, None, None], persistent=False)

    def forward(self, x):
        return (x @ self.weight.mT + self.bias[:, None]).masked_fill(self.beyond, -math.inf)


class Core(nn.Module):
    """The D core layers of T tasks, all tasks at once, in the order that the method gives.
    width: units of the dense layers m -> m, or, if convolutional, channels of 3x3 convolutions followed by 2x2 max-pooling.
    orders: for permuted, int64 (T, D), the layer of each task at each depth.  dropout: share, after each layer. Called with y^0,
    (T, B, m) or (T, B, C, H, W), channels beyond C being 0, or (1, B, ...) if all tasks have it; returns y^D, (T, B, ...).
    """

    def __init__(self, num_tasks: int, method: str, depth: int, width: int, *, convolutional=False, activation="relu",
                 dropout=0.0, identity_layer=False, orders=None):
        super().__init__()
        self.num_tasks, self.method, self.depth, self.dropout, self.activation = num_tasks, method, depth, dropout, activation
        kernel, sets = (3, 3) if convolutional else (), num_tasks if method == "single" else 1
        self.weight = nn.Parameter(torch.empty(sets, depth, width, width, *kernel))
        for weight in self.weight.detach().flatten(0, 1):
            nn.init.xavier_uniform_(weight)
        self.bias = nn.Parameter(torch.zeros(sets, depth, width))
        self.scores = nn.Parameter(torch.zeros(num_tasks, depth + identity_layer, depth)) if method == "soft" else None
        self.register_buffer("orders", orders if method == "permuted" else None)

    def forward(self, y):
        rate = self.dropout if self.training else 0.0
        if self.method == "soft":
            return soft_order(self.scores, self.all_layers, y, rate)
        for k in range(self.depth):
            if self.method == "permuted" and len(y) == 1 < self.num_tasks:  # every layer once, on the tasks' common input
                y = self.all_layers(y)[0].index_select(1, self.orders[:, k]).transpose(0, 1)
            elif self.method == "permuted":  # no layer is computed for a task that does not use it
                y = self.products(y, *(p[0].index_select(0, self.orders[:, k]) for p in (self.weight, self.bias)))
            else:  # a layer of all tasks, or (single) of each
                y = self.products(y, self.weight[:, k], self.bias[:, k])
            y = drop(y, rate, self.num_tasks)
        return y.expand(self.num_tasks, *y.shape[1:])

    def all_layers(self, y):
        """What every layer makes of all rows of y, (T, B, D, m, ...): one product, with the layers side by side."""
        return self.products(y, self.weight.flatten(1, 2), self.bias.flatten(1, 2)).unflatten(2, (self.depth, -1))

    def products(self, y, weight, bias):
        """A layer for all tasks (G = 1) or one each (G = T): y (T or 1, B, C, ..), weight (G, M, C, ..) -> (T or 1, B, M, ..)."""
        common = len(weight) == 1
        rows = y.flatten(0, 1)[None] if common else y.expand(len(weight), *y.shape[1:])  # (G, N, C, ...)
        if weight.dim() == 3:
            z = F.linear(rows, weight[0], bias[0]) if common else torch.baddbmm(bias[:, None], rows, weight.mT)
        else:
            # Only the channels that the input has: the rest of a kernel would meet zeros. Bias and ReLU commute with the
            # maximum, and have a quarter of the work after it.
            z = F.conv2d(rows.transpose(0, 1).flatten(1, 2), weight[:, :, : y.shape[2]].flatten(0, 1), groups=len(weight))
            z = F.max_pool2d(z, 2).unflatten(1, (len(weight), -1)).transpose(0, 1) + bias[:, None, :, None, None]
        z = z.relu_() if self.activation == "relu" else z
        return z[0].unflatten(0, y.shape[:2]) if common else z


class SoftOrder(nn.Module):
    """Eq. 7 around your own layer.

    num_tasks: T.  layer: a module whose output has its input's shape, or a function that makes one. `depth` of them are used;
    copies of a module get random weights of their own from its parts' reset_parameters().
    dropout: dropped share of each layer's output.  identity_layer: one more layer to mix, which returns its input. Called with
    x (T, B, ...), or (1, B, ...) if all tasks have this input; returns (T, B, ...). Raises ValueError where the layer changes
    the shape, or cannot be drawn anew.

        import torch
        from soft_order import SoftOrder
        layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        core = SoftOrder(num_tasks=3, layer=layer, depth=4, dropout=0.1)
        decoder = torch.nn.Linear(8, 1)
        optimizer = torch.optim.Adam([*core.parameters(), *decoder.parameters()], lr=0.01)
        x = torch.randn(3, 32, 8)  # a batch of 32 for each of the three tasks
        target = torch.stack([x[0].sum(1), x[1].amax(1), x[2].norm(dim=1)])
        for _ in range(20):
            loss = (decoder(core(x))[:, :, 0] - target).square().mean(dim=1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(core.scores.softmax(dim=1))  # (task, layer, depth): which task uses which layer where
    """

    def __init__(self, num_tasks: int, layer, depth: int, dropout: float = 0.0, identity_layer: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(deepcopy(layer) if isinstance(layer, nn.Module) else layer() for _ in range(depth))
        for part in self.layers.modules() if isinstance(layer, nn.Module) else ():  # equal layers would stay equal for ever
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
            elif part._parameters:
                raise ValueError(f"{type(part).__name__} has no reset_parameters(): pass a function that makes a layer")
        self.scores, self.dropout = nn.Parameter(torch.zeros(num_tasks, depth + identity_layer, depth)), dropout

    def forward(self, x):
        return soft_order(self.scores, self.all_layers, x, self.dropout if self.training else 0.0)

    def all_layers(self, y):
        """What every layer makes of all rows of y, (T, B, D, ...): one call of each layer."""
        rows = y.flatten(0, 1)
        outputs = [layer(rows) for layer in self.layers]
        if outputs[0].shape != rows.shape:
            raise ValueError(f"the layer turns {tuple(rows.shape[1:])} into {tuple(outputs[0].shape[1:])}: one shape is needed")
        return torch.stack(outputs, dim=1).unflatten(0, y.shape[:2])


# -------- Losses and the bi-level step ----------------------------------------------------------------------------------

def drop(y, rate: float, num_tasks: int):
    """Dropout of a share `rate` of y (T or 1, ...), with a mask of its own for each of the num_tasks tasks."""
    y = y.expand(num_tasks, *y.shape[1:]) if rate else y
    return y * torch.rand_like(y).ge_(rate).div_(1 - rate) if rate else y  # F.dropout's bernoulli is slower on the CPU


def soft_order(scores, layers, y, dropout: float = 0.0):
    """Eq. 7 for all tasks at once. Returns y^D, (T, B, ...).
    scores: free parameters (T, L, D) by task, layer and depth; s is their softmax over the layers.  layers: a function of y (T,
    B, ...) that gives every layer's outputs (T, B, L, ...), or L - 1 of them if the last one is the identity.  dropout: dropped
    share of these.  y: y^0, (T, B, ...), or (1, B, ...) if all tasks have this input: the first depth then runs once for all.
    """
    s = scores.softmax(dim=1)
    for k in range(s.shape[2]):
        outputs = drop(layers(y), dropout, len(s))  # (T or 1, B, L or L - 1, ...)
        count, shape = outputs.shape[2], outputs.shape[3:]
        mixed = torch.einsum("tl,tblf->tbf", s[:, :count, k], outputs.flatten(3).expand(len(s), -1, -1, -1)).unflatten(2, shape)
        y = mixed if count == s.shape[1] else mixed + s[:, count, k].view(-1, *[1] * (y.dim() - 1)) * y
    return y


def sample_losses(logits, y):
    """The cross-entropy of each sample, (T, B), for logits (T, B, C) and classes y (T, B)."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)


def training_step(network, optimizer, x, y):
    """An optimiser step on the sum of the tasks' mean losses, which is returned. x: (T, B, ...) or (1, B, ...).  y: (T, B)."""
    loss = sample_losses(network(x), y).mean(dim=1).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# -------- Plumbing: the same text in all six scripts --------------------------------------------------------------------

def fail(message, code: int = 2):
    """End the program with one line on stderr."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def end_on_sigterm() -> None:
    """On SIGTERM, end with one line and code 143. At once: an exception that is raised in a callback, a fork's say, is lost."""
    run = os.getpid()

    def end(*_):
        if os.getpid() == run:  # not a loader's worker that was only just forked
            os.write(2, f"{Path(__file__).name}: error: terminated; --resume continues after the last finished epoch\n".encode())
        os._exit(143)

    signal.signal(signal.SIGTERM, end)


def number(kind, low, high=10**9):
    """An argparse type: a finite int or float from low to high, both included."""

    def convert(text):
        with suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite {kind.__name__} from {low} to {high}")

    return convert


def choose_device(name: str, cuda_graph: bool = False) -> torch.device:
    """auto, cpu, cuda or cuda:N. On CUDA, TF32 and cuDNN's search for the fastest kernels are switched on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}; known are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {name}: there are {torch.cuda.device_count()} CUDA devices; --device cpu runs without")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if cuda_graph and device.type != "cuda":
        raise InputError("--cuda-graph needs a CUDA device")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # whose streams and graphs are used
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    return device


def capture(step, optimizers, enabled: bool):
    """`step`, or if enabled a function that replays it as one CUDA graph, so that a step is one launch and not thousands.

    step: takes tensors, or tuples and lists of them, whose shapes stay the same; returns a tuple of tensors; reads nothing from
    the device. Three calls run as they are: optimisers make their state, cuDNN chooses its kernels. A graph holds all numbers
    as they were, so another one is captured when a learning rate of `optimizers` has changed.
    """
    if not enabled:
        return step
    warnings.filterwarnings("ignore", message=".*capturable=True")  # said of the first calls, which run as they are
    stream, held = torch.cuda.Stream(), {"calls": 0}

    def tensors(nested):
        parts = nested if isinstance(nested, tuple | list) else ()
        return [nested] if isinstance(nested, torch.Tensor) else [t for part in parts for t in tensors(part)]

    def replay(*inputs):
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        held["calls"] += 1
        if held["calls"] <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = step(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if held.get("rates") != rates:
            held.update(rates=rates, graph=torch.cuda.CUDAGraph(), inputs=deepcopy(inputs))
            with torch.cuda.graph(held["graph"], stream=stream, capture_error_mode="thread_local"):  # a loader has threads too
                held["outputs"] = step(*held["inputs"])
        for place, new in zip(tensors(held["inputs"]), tensors(inputs), strict=True):
            place.copy_(new)
        held["graph"].replay()
        return [t.clone() for t in held["outputs"]]  # the next call overwrites them

    return replay


def run_folder(args) -> Path:
    """out-dir/SCRIPT-DATASET-METHOD-sSEED; of folder:PATH, PATH's last part. A run that is there is only ever resumed."""
    dataset = f"folder-{Path(args.dataset[7:]).resolve().name}" if args.dataset.startswith("folder:") else args.dataset
    folder = Path(args.out_dir) / f"{Path(__file__).stem}-{dataset}-{args.method}-s{args.seed}"
    if not args.resume and any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "last.pt")):
        raise InputError(f"{folder} already holds a run; --resume continues it, another --out-dir starts a new one")
    return folder


def open_run(args, device) -> Path:
    """Make the run's folder and its config.json, or check that the run there had the same arguments."""
    folder = run_folder(args)
    path, arguments = folder / "config.json", json.loads(json.dumps(vars(args) | {"device": device.type}))
    machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
               "threads": torch.get_num_threads(), "python": platform.python_version(),
               "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"arguments": arguments, "machine": machine, "command": " ".join(sys.argv)}, indent=2) + "\n")
        return folder
    with reading(path):
        before = json.loads(path.read_text())
        known = arguments.keys() & before["arguments"].keys()  # an older run lacks newer flags
        for name in sorted(known - {"resume", "seeds", "plot", "data_root", "out_dir", "workers"}):
            if arguments[name] != (old := before["arguments"][name]):
                raise InputError(f"{folder} was run with --{name.replace('_', '-')} {old}, not {arguments[name]}")
        for name, value in machine.items():
            if value != (old := before["machine"].get(name)):
                print(f"note: {name} was {old} and is now {value}; numbers may differ in the last bits")
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(folder: Path, state: dict, history: list[dict]) -> None:
    """last.pt, then metrics.jsonl. state: by name, torch.Generators and whatever has a state_dict."""
    checkpoint = {k: v.get_state() if isinstance(v, torch.Generator) else v.state_dict() for k, v in state.items()}
    checkpoint |= {"history": history, "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    torch.save(checkpoint, folder / "last.pt.tmp")
    os.replace(folder / "last.pt.tmp", folder / "last.pt")
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def load_checkpoint(folder: Path, state: dict) -> list[dict]:
    """Bring `state` to the last finished epoch, cut metrics.jsonl back to it, return the metrics of its epochs."""
    path = folder / "last.pt"
    if not path.exists():
        return []
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, item in state.items():
            (item.set_state if isinstance(item, torch.Generator) else item.load_state_dict)(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        if len(checkpoint["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in checkpoint["history"]))
    return checkpoint["history"]


def log_epoch(metrics: dict, epochs: int, names: tuple[str, ...]) -> None:
    """Print an epoch's line, above the progress bar."""
    values = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    tqdm.write(f"epoch {metrics['epoch']}/{epochs}  {values}  {metrics['images_per_second']:.0f} images/s  "
               f"{metrics['milliseconds_per_step']:.1f} ms/step  {metrics['peak_memory_mib']:.0f} MiB")
    sys.stdout.flush()  # for who follows a log file


def peak_memory_mib(device) -> float:
    """The most memory so far: what torch allocated on CUDA, the whole process's on the CPU (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return 0.0


def summarize(folder: Path, history: list[dict], metric: str, best=max) -> dict:
    """Write, print and return the summary: the metric at the end, over the last 15 epochs, and its best, chosen on test."""
    values = [line[metric] for line in history]
    summary = {metric: values[-1], f"{metric}_last15": statistics.fmean(values[-15:]),
               f"best_{metric}": best(values), "best_epoch": values.index(best(values)) + 1,
               "epochs": len(values), "seconds": history[-1]["seconds"],
               "images_per_second": statistics.median(line["images_per_second"] for line in history),
               "peak_memory_mib": max(line["peak_memory_mib"] for line in history), "folder": str(folder)}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"{metric} {values[-1]:.2f} after {len(values)} epochs in {summary['seconds']:.0f} s: {folder}")
    return summary


def run_seeds(args, train, metric: str) -> dict:
    """Train once, or once for each of --seeds: mean, sample standard deviation and half the 95 % t interval."""
    if args.seeds is None:
        return train(args)
    runs = [argparse.Namespace(**vars(args) | {"seed": seed}) for seed in dict.fromkeys(args.seeds)]
    for run in runs:
        run_folder(run)  # an error for the last one must not wait for the others to train
    summaries = [train(run) for run in runs]
    values = [summary[metric] for summary in summaries]
    mean, std, half = statistics.fmean(values), math.nan, math.nan
    if (df := len(values) - 1) > 0:
        t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's 97.5 % quantiles
        std = statistics.stdev(values)
        half = (t[df - 1] if df <= len(t) else 1.96 + 2.4 / df + 2.9 / df**2) * std / math.sqrt(df + 1)
    print(f"{metric} {mean:.2f} +- {std:.2f} over {len(runs)} seeds, 95 % interval +- {half:.2f}: {args.out_dir}")
    return {metric: mean, f"{metric}_std": std, f"{metric}_interval95": half, "runs": summaries}


def plot(path: Path, x: list, curves: dict[str, list], xlabel: str) -> None:
    """Draw the curves over x into a PNG."""
    from matplotlib.figure import Figure  # optional package

    axes = (figure := Figure()).subplots()
    for name, values in curves.items():
        axes.plot(x, values, label=name)
    axes.set_xlabel(xlabel)
    axes.legend()
    figure.savefig(path, dpi=150)


# -------- Training ------------------------------------------------------------------------------------------------------

# num_outputs: of each task, 1 for two classes and one sigmoid; num_inputs: of its encoder, or None; one entry: all have one
Tasks = namedtuple("Tasks", "names train test num_outputs num_inputs", defaults=[None])


class Samples(namedtuple("Samples", "x y counts")):
    """The training or the test samples of all tasks: x (N, ...) and classes y (N,), one task's after another's, and counts (T,),
    how many each has. Where all tasks have the same inputs: x (N, ...), y (T, N) and counts (1,)."""

    def take(self, index):
        """x (T or 1, B, ...) and y (T, B) at index (T or 1, B) among each task's samples."""
        index = index + (self.counts.cumsum(0) - self.counts)[:, None]
        return self.x[index].float(), self.y[index] if self.y.dim() == 1 else self.y[:, index[0]]


def join(parts) -> Samples:
    """The samples (x, y) of several tasks, one after another; vectors of features get zeros at their end."""
    width = max(x.shape[1] for x, _ in parts)
    x = torch.cat([F.pad(x, [0, width - x.shape[1]]) if x.dim() == 2 else x for x, _ in parts])
    return Samples(x, torch.cat([y for _, y in parts]), torch.tensor([len(y) for _, y in parts]))


def load_random(args) -> Tasks:
    """Tasks without structure and with a common decoder: x uniform in [0, 1]^m, y 0 or 1 (3.2)."""
    generator, n = torch.Generator().manual_seed(args.seed), args.tasks * args.samples
    x, y = torch.rand(n, args.width, generator=generator), torch.randint(2, (n,), generator=generator)
    return Tasks([f"random-{t}" for t in range(args.tasks)], Samples(x, y, torch.tensor([args.samples] * args.tasks)), None, [1])


def load_synthetic(args) -> Tasks:
    """Six tasks with inputs and decoder in common, the six orders of the same three layers: x is 8 normal numbers, y says
    whether what the layers make of it is above its mean along a direction. The same data for every seed."""
    generator = torch.Generator().manual_seed(0)
    layers, bias = 1.5 * torch.linalg.qr(torch.randn(3, 8, 8, generator=generator))[0], torch.randn(3, 8, generator=generator).abs()
    direction, x = torch.randn(8, generator=generator), torch.randn(10000, 8, generator=generator)
    orders, z = torch.tensor(list(itertools.permutations(range(3)))), x.expand(6, -1, -1)
    for layer in orders.T:  # (6,): each task's next one
        z = (z @ layers[layer] + bias[layer, None]).relu()
    y = ((z - z.mean(dim=1, keepdim=True)) @ direction > 0).long()  # (6, 10000)
    parts = (Samples(x[half::2], y[:, half::2], torch.tensor([5000])) for half in (0, 1))
    return Tasks(["".join(map(str, order)) for order in (orders + 1).tolist()], *parts, [1])


def load_mnist(args) -> Tasks:
    """One digit against another (A.1: different within a task, drawn with replacement across tasks). Each task sees the
    images through a frozen random layer of its own (4.1), whose outputs are computed here, once."""
    folder = Path(args.data_root) / "MNIST" / "raw"
    files = [folder / f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    ensure_files("mnist", files, lambda: datasets.MNIST(args.data_root, download=True), f"put MNIST's four files into {folder}")
    found = []  # training images (N, 28, 28), labels (N,), those of the test set
    for path in files:
        with reading(path):
            found.append(datasets.mnist.read_sn3_pascalvincent_tensor(str(path)))
    generator, parts = torch.Generator().manual_seed(args.seed), ([], [])
    drawn = (sorted(torch.randperm(10, generator=generator)[:2].tolist()) for _ in range(args.tasks))
    names = args.task_names or ["-".join(map(str, pair)) for pair in drawn]
    for low, high in (map(int, name.split("-")) for name in names):
        encoder = (2 * torch.rand(784, args.width, generator=generator) - 1) * math.sqrt(6 / (784 + args.width))  # Glorot
        for part, images, labels in zip(parts, found[::2], found[1::2], strict=True):
            with reading(folder):  # images and labels may not fit each other
                keep = (labels == low) | (labels == high)
                part.append(((images[keep].flatten(1) / 255 @ encoder).relu(), (labels[keep] == high).long()))
    return Tasks(names, *map(join, parts), [1] * len(names))


def read_table(root: Path, name: str):
    """A UCI table: features (N, F), nan where one is missing, and classes (N,)."""
    source, dropped, target, features, classes, rows = TABLES[name]
    path, url = root / "uci" / Path(source).name, "https://archive.ics.uci.edu/ml/machine-learning-databases/" + source
    ensure_files(name, [path], lambda: datasets.utils.download_url(url, str(path.parent), path.name),
                 f"put {path.name} into {path.parent} (in the UCI repository it is or was {source})")
    x, labels = [], []
    with reading(path):
        for i, line in enumerate(path.read_text().splitlines(), 1):
            if cells := line.replace(",", " ").split():
                if len(cells) != dropped + features + 1:
                    raise InputError(f"{path}, line {i}: {len(cells)} columns, not {dropped + features + 1}")
                labels.append(cells.pop(dropped if target == 0 else -1))
                x.append([math.nan if cell == "?" else float(cell) for cell in cells[dropped:]])
        known = sorted(set(labels))
        if (len(x), len(known)) != (rows, classes):
            raise InputError(f"{path} has {len(x)} rows and {len(known)} classes, not {rows} and {classes}")
        return torch.tensor(x), torch.tensor([known.index(label) for label in labels])


def load_uci(args) -> Tasks:
    """Tables that have nothing to do with each other, with learned encoders (4.2). The split is the same for every seed."""
    parts = [], []
    for name in args.task_names:
        x, y = read_table(Path(args.data_root), name)
        order, n = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)), max(1, round(args.test_fraction * len(y)))
        x = torch.where(x.isnan(), x[order[n:]].nanmedian(dim=0).values, x)
        low, high = x[order[n:]].aminmax(dim=0)
        x = ((x - low) / (high - low).where(high > low, 1)).clamp(0, 1)
        for part, index in zip(parts, (order[n:], order[:n]), strict=True):
            part.append((x[index], y[index]))
    return Tasks(args.task_names, *map(join, parts), *([TABLES[name][i] for name in args.task_names] for i in (4, 3)))


def load_omniglot(args) -> Tasks:
    """Alphabets, whose characters are the classes (4.3): uint8 (N, 1, 105, 105), ink 1, paper 0. No encoder."""
    root, parts, generator = Path(args.data_root) / "omniglot-py", ([], []), torch.Generator().manual_seed(args.seed)

    def find():
        return [next(root.glob(f"images_*/{name}"), root / "images_background" / name) for name in args.task_names]

    ensure_files("omniglot", find(), lambda: [datasets.Omniglot(args.data_root, b, download=True) for b in (True, False)],
                 f"unpack images_background.zip and images_evaluation.zip in {root}, or choose others by --task-names")
    for folder in find():
        with reading(folder):  # whose images may also differ in size
            images, files = [], datasets.ImageFolder(str(folder)).samples
            for path, _ in files:
                with reading(path):
                    images.append(pil_to_tensor(datasets.folder.pil_loader(path))[:1] < 128)
            split = Split(torch.stack(images).byte(), torch.tensor([label for _, label in files]))
        for part, found in zip(parts, hold_out(split, args.test_fraction, generator), strict=True):
            part.append((found.images, found.labels))
    return Tasks(args.task_names, *map(join, parts), [int(y.max()) + 1 for _, y in parts[0]])


def build_network(args, tasks: Tasks) -> nn.Sequential:
    """Encoder, core and decoder of the run's data set and method."""
    count, sides, inputs, outputs = len(tasks.names), tasks.train.x.shape[2:], tasks.num_inputs, tasks.num_outputs
    for _ in range(args.depth):
        sides = [(side - 2) // 2 for side in sides]  # an unpadded convolution, and the pooling
    if min(sides, default=1) < 1:
        raise InputError(f"--depth {args.depth} leaves nothing of images of {'x'.join(map(str, tasks.train.x.shape[2:]))} pixels")
    cyclic = args.dataset == "random"  # Eq. 4: the next task begins with the next layer
    orders = torch.stack([torch.arange(args.depth).roll(-t) if cyclic else torch.randperm(args.depth) for t in range(count)])
    encoder = nn.Sequential(Heads(inputs, [args.width] * len(inputs)), nn.ReLU()) if inputs else nn.Identity()
    core = Core(count, args.method, args.depth, args.width, convolutional=bool(sides), activation=args.activation,
                dropout=args.dropout, identity_layer=args.identity_layer, orders=orders)
    zero = nn.ConstantPad1d((1, 0), 0.0) if max(outputs) == 1 else nn.Identity()  # the sigmoid of z is the softmax of (0, z)
    return nn.Sequential(encoder, core, nn.Flatten(2), Heads([args.width * math.prod(sides)] * len(outputs), outputs), zero)


@torch.no_grad()
def evaluate(network, samples: Samples, metric: str) -> dict:
    """The metric, X_error: the mean over the tasks of the error in percent; X_loss; and each task's error; in eval mode."""
    network.eval()
    counts, wrong, loss = samples.counts, 0, 0
    rows = (16 if samples.x.dim() == 4 else 16384) * (16 if samples.x.is_cuda else 1)  # images take memory
    for places in torch.arange(int(counts.max()), device=counts.device).split(max(1, rows // len(counts))):
        real = places < counts[:, None]  # (T, B): a task with fewer samples repeats its first one, which does not count
        x, y = samples.take(places.where(real, 0))
        logits = network(x)
        wrong, loss = wrong + ((logits.argmax(2) != y) & real).sum(1), loss + (sample_losses(logits, y) * real).sum(1)
    network.train()
    errors, loss = 100 * wrong / counts, float((loss / counts).sum())
    return {metric: float(errors.mean()), metric.replace("error", "loss"): loss, "task_errors": errors.tolist()}


def describe_scales(scores) -> dict:
    """What the scores (T, L, D) say. scales: s of Eq. 7.  distance (L,): between two tasks' scalings of a layer, the mean over
    pairs of tasks (Fig. 4b).  hardness: the largest scaling, the mean over tasks and depths; 1 is a hard order (Fig. 4c).
    path (T, D): its layer (Fig. 4d).  use (L, D): a layer's scaling at each depth, the mean over tasks (Figs. 6b, 7a-b)."""
    s = scores.detach().double().cpu().softmax(dim=1)
    distance = [float(torch.pdist(layer).mean()) if len(s) > 1 else 0.0 for layer in s.unbind(dim=1)]
    return {"scales": s.tolist(), "distance": distance, "hardness": float(s.amax(dim=1).mean()),
            "path": s.argmax(dim=1).tolist(), "use": s.mean(dim=0).tolist()}


def train(args) -> dict:
    """One run, from its last checkpoint if there is one. Returns the summary."""
    device = choose_device(args.device, args.cuda_graph)
    torch.manual_seed(args.seed)
    tasks = {"mnist": load_mnist, "uci": load_uci, "omniglot": load_omniglot, "random": load_random,
             "synthetic": load_synthetic}[args.dataset](args)
    smallest, largest = (int(n) for n in tasks.train.counts.aminmax())
    if (batch_size := args.batch_size or smallest) > smallest:
        raise InputError(f"--batch-size {batch_size}: there is a task with {smallest} training samples")
    network = build_network(args, tasks).to(device)
    training, test = (Samples(*(t.to(device) for t in samples)) for samples in (tasks.train, tasks.test or tasks.train))
    generator = torch.Generator(device).manual_seed(args.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, fused=True, capturable=args.cuda_graph)
    state = {"network": network, "optimizer": optimizer, "generator": generator}
    history = load_checkpoint(folder := open_run(args, device), state)
    counts, draw = training.counts, {"dtype": torch.float64, "generator": generator, "device": device}  # float32 may round to 1 n
    whole = torch.arange(batch_size, device=device).expand(len(counts), -1) if batch_size == largest else None
    print(f"{args.method} on {args.dataset}: {len(tasks.names)} tasks of {smallest} to {largest} training samples, "
          f"{args.max_steps} iterations, {'CUDA with TF32' if device.type == 'cuda' else 'CPU'}, seed {args.seed}")

    def one_step(x, y):
        return (training_step(network, optimizer, x, y),)

    take_step = capture(one_step, [optimizer], args.cuda_graph)

    for epoch in range(len(history), args.epochs):
        began, steps = time.perf_counter(), min(args.epoch_steps, args.max_steps - epoch * args.epoch_steps)
        loss_sum, first_bad = torch.zeros((), device=device), torch.full((), steps, device=device)  # first step that was not finite
        for step in tqdm(range(steps), desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=None):
            drawn = whole if whole is not None else (torch.rand(len(counts), batch_size, **draw) * counts[:, None]).long()
            (loss,) = take_step(*training.take(drawn))
            loss_sum, first_bad = loss_sum + loss, torch.where(loss.isfinite(), first_bad, first_bad.clamp(max=step))

        # The epoch's figures: its only reads from the device
        bad, seconds = int(first_bad), time.perf_counter() - began  # in this order: the read waits for the device
        metrics = {"epoch": epoch + 1, "iterations": epoch * args.epoch_steps + steps, "loss": float(loss_sum) / steps}
        metrics |= evaluate(network, test, args.metric)
        if bad < steps or not torch.stack([p.isfinite().all() for p in network.parameters()]).all():
            bad = min(bad, steps - 1) + 1  # the last step's loss may have been finite still
            fail(f"epoch {epoch + 1}: the loss is not finite from step {bad} on; a checkpoint of the epoch before is kept", code=3)
        metrics |= describe_scales(network[1].scores) if args.method == "soft" else {}
        metrics |= {"images_per_second": steps * batch_size * len(tasks.names) / seconds,
                    "milliseconds_per_step": 1000 * seconds / steps, "peak_memory_mib": peak_memory_mib(device),
                    "seconds": (history[-1]["seconds"] if history else 0.0) + time.perf_counter() - began}
        history.append(metrics)
        save_checkpoint(folder, state, history)
        log_epoch(metrics, args.epochs, ("loss", args.metric))
    if args.plot:
        plot(folder / "curves.png", [h["iterations"] for h in history], {args.metric: [h[args.metric] for h in history]}, "step")
    return summarize(folder, history, args.metric, best=min)


def analyze(args) -> dict:
    """Runs' errors by data set, number of tasks and method, and as a share of parallel order's with the same seeds, with the
    interval over their seeds (Fig. 4a)."""
    errors, summary = {}, {}  # errors[data set, number of tasks, method][seed]
    for folder in map(Path, args.analyze):
        with reading(folder):
            run = json.loads((folder / "config.json").read_text())["arguments"]
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            errors.setdefault((run["dataset"], run["tasks"], run["method"]), {})[run["seed"]] = last[run["metric"]]
    for (dataset, count, method), found in sorted(errors.items()):
        parallel = errors.get((dataset, count, "parallel"), {})
        shares = [error / parallel[seed] for seed, error in found.items() if parallel.get(seed)]
        print(f"{dataset}, {count} tasks, {method}, {statistics.fmean(shares or [math.nan]):.3f} of parallel: ", end="")
        runs = argparse.Namespace(**vars(args) | {"seeds": list(found), "resume": True})
        result = run_seeds(runs, lambda run, found=found: {"error": found[run.seed]}, "error")
        summary[f"{dataset}-{count}-{method}"] = result | {"of_parallel": shares}
    return summary


def main(argv=None) -> dict:
    """Run the command line; returns the summary."""
    args = parse_args(argv)
    try:
        if args.plot:
            import matplotlib.figure  # noqa: F401 - if it is missing, say so now and not after the last epoch
        return analyze(args) if args.analyze is not None else run_seeds(args, train, args.metric)
    except ModuleNotFoundError as error:
        fail(f"this needs the package {error.name}: pip install {error.name}")
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; --resume continues after the last finished epoch", code=130)


if __name__ == "__main__":
    end_on_sigterm()
    main()
