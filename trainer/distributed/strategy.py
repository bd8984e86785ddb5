"""Which ``tf.distribute`` strategy fits this machine and cluster, and what its workers exchange.

    chosen = create("auto", cluster=cluster.resolve(os.environ), gpus=None)
    chosen.strategy, chosen.reason      # "MirroredStrategy over 4 GPUs: all that are seen"
    Workers(chosen.strategy).share(b"from worker 0 to all")

What is chosen and what is done with it are apart: ``loop`` runs the same graph under every
strategy, on a TPU too, so all but the connection to one is run on CPU devices.
"""

import contextlib
import dataclasses
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from trainer.config import Strategy
from trainer.distributed import ring
from trainer.distributed.cluster import Cluster
from trainer.distributed.worker import PeerError
from trainer.errors import ConfigurationError, UsageError
from trainer.runtime import keras, tf

# Of Google's PCI devices those that are TPUs (v2 and v3, v4, v5, v6e), as JAX tells them apart.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006e", "0x006f")

_SEED_STRIDE = 0x9E3779B9  # 2**32 divided by the golden ratio: far apart for any few replicas


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A strategy, and the sentence that says what it is and why."""

    strategy: tf.distribute.Strategy
    reason: str


def create(
    kind: Strategy, *, cluster: Cluster | None, gpus: int | None, startup_timeout: float
) -> Chosen:
    """Chooses and makes a strategy. Only before TensorFlow's first operation, where there are GPUs.

    Args:
        kind: ``auto``: several workers, then a TPU, then several GPUs, then one device; or which.
        cluster: The workers; None: this process is alone. All of them must have come: without one,
            TensorFlow waits for it with Python's lock held.
        gpus: How many this process must have, and uses; None: all that are there; 0: none.
        startup_timeout: Seconds in which a TPU must answer.

    Raises:
        ConfigurationError: What was asked for is not there.
    """
    seen = _gpus(gpus)
    if cluster and kind not in ("auto", "multiworker"):
        raise ConfigurationError(
            f"Expected one worker for --strategy {kind}. Received: {len(cluster.workers)}. "
            "Use --strategy multiworker, or unset TF_CONFIG and TRAINER_WORKERS to train alone."
        )
    if cluster:
        return _multiworker(cluster, seen)
    if kind == "multiworker":
        raise ConfigurationError(
            "Expected several workers for --strategy multiworker. Received: none described. "
            "Set TF_CONFIG, or use python -m trainer.launch --workers N on this machine."
        )
    if kind == "tpu" or (kind == "auto" and gpus is None and _has_tpu(os.environ)):
        return _tpu(os.environ, startup_timeout)
    if kind == "mirrored" or (kind == "auto" and len(seen) > 1):
        return _mirrored(seen)
    if seen:
        return Chosen(tf.distribute.get_strategy(), f"one device: GPU 0 of {len(seen)}")
    why = "as --gpus 0 asks" if gpus == 0 else "no GPU is seen"
    if gpus is None and _has_nvidia_gpu():
        why = f"no GPU is seen, though this machine has one. {_gpu_remedy()}"
    return Chosen(tf.distribute.get_strategy(), f"one device: the CPU ({why})")


def has_memory_of_its_own() -> bool:
    """Tells whether this process computes on devices with a memory of their own: GPUs, TPUs."""
    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def check_batch_size(batch_size: int, replicas: int) -> None:
    """Checks that a global batch divides among the replicas.

    Raises:
        UsageError: It does not; the message names the sizes beside it that do.
    """
    if batch_size % replicas:
        below = batch_size // replicas * replicas
        sizes = " or ".join(str(size) for size in (below, below + replicas) if size)
        raise UsageError(
            f"batch_size must be a multiple of the {replicas} replicas. "
            f"Received: batch_size={batch_size}. Use {sizes}."
        )


def separate_seeds(model: keras.Model) -> None:
    """Makes every replica draw random numbers of its own in the model's layers (dropout masks).

    Keras keeps the state of a layer's ``SeedGenerator`` equal on all replicas, and so would drop
    the same units for every slice of a batch. Here each replica adds its number to the seed it
    draws. The state itself, and so what a checkpoint holds, stays one; the layers stay Keras' own;
    and replica 0 draws what it would draw alone.
    """
    for layer in _layers(model):
        for generator in vars(layer).values():
            if isinstance(generator, keras.random.SeedGenerator) and not isinstance(
                generator.next, _ReplicaSeed
            ):
                generator.next = _ReplicaSeed(generator.next)


class Workers:
    """What the workers of a strategy tell one another, by its all-reduce.

    Every method must be called by all of them, in the same order. Alone, they cost nothing.

    Attributes:
        count: How many there are.
        index: Which of them this process is.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self.strategy = strategy
        self.count, self.index = 1, 0
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            resolver = strategy.cluster_resolver
            self.count = len(resolver.cluster_spec().as_dict()["worker"])
            self.index = resolver.task_id

    def sum(self, values: tf.Tensor) -> tf.Tensor:
        """Returns, inside a ``tf.function``, the sum over the workers of what each has."""
        if self.count == 1:
            return values
        here = self.strategy.num_replicas_in_sync // self.count

        def of_replica(values: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group % here == 0  # Once a worker.
            values = tf.where(first, values, tf.zeros_like(values))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, values)

        return self.strategy.experimental_local_results(self.strategy.run(of_replica, (values,)))[0]

    def gather(self, value: int) -> list[int]:
        """Returns every worker's value, a 32-bit integer, in their order."""
        values = np.zeros(self.count, np.int32)
        values[self.index] = value
        return self._sum(values).tolist()

    def first(self, value: int) -> int:
        """Returns worker 0's value."""
        return self.gather(value)[0]

    def have_equal(self, content: bytes) -> bool:
        """Tells whether all have the same content, of the same length: a multiple of 4."""
        words = np.frombuffer(content, np.int32)
        rows = np.zeros((self.count, len(words)), np.int32)
        rows[self.index] = words
        return bool((self._sum(rows) == words).all())

    def share(self, content: bytes) -> bytes:
        """Returns worker 0's content, the bits unchanged."""
        if self.count == 1:
            return content
        size = self.first(len(content))
        words = np.zeros(-(-size // 4), np.int32)
        if self.index == 0:  # The sum of the bits and of zeros is the bits.
            words = np.frombuffer(content.ljust(4 * len(words), b"\0"), np.int32)
        return self._sum(words).tobytes()[:size]

    def _sum(self, values: np.ndarray) -> np.ndarray:
        if self.count == 1:
            return values
        return _adder(self.strategy)(values.ravel()).numpy().reshape(values.shape)


@contextlib.contextmanager
def lost_peers() -> Iterator[None]:
    """Calls by its name what is raised when another worker is gone: by TensorFlow's collectives, or
    by the ring, whose errors are ``UnknownError`` inside a ``tf.function``.
    """
    try:
        yield
    except (
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
        tf.errors.InternalError,
        tf.errors.UnavailableError,
        tf.errors.UnknownError,
        ConnectionError,
    ) as error:
        # Its message is a traceback of the graph; what happened stands at its end.
        lines = [line.strip() for line in str(error).splitlines()]
        reasons = [
            line for line in lines if line and not line.startswith(("[[", "The error could"))
        ]
        raise PeerError(f"another worker was lost: {reasons[-1][:300]}") from error


@functools.cache  # Traced once for a strategy, whatever is exchanged.
def _adder(strategy: tf.distribute.Strategy) -> Callable[[np.ndarray], tf.Tensor]:
    return tf.function(Workers(strategy).sum, autograph=False, reduce_retracing=True)


def _gpus(count: int | None) -> list:
    """Returns the GPUs that this process uses, each set to take memory as it needs it."""
    seen = tf.config.list_physical_devices("GPU")
    if count is not None:
        if len(seen) < count:
            raise ConfigurationError(
                f"Expected {count} GPUs, as --gpus {count} asks. Received: {len(seen)}. "
                f"{_gpu_remedy()}"
            )
        seen = seen[:count]
        try:
            tf.config.set_visible_devices(seen, "GPU")
        except RuntimeError:
            if len(tf.config.list_logical_devices("GPU")) != count:
                raise ConfigurationError(
                    f"Expected to choose gpus={count} before TensorFlow's first operation. "
                    "Received: a TensorFlow that is running. Start a new Python."
                ) from None
    for gpu in seen:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            break  # TensorFlow is running, as whoever started it wanted it.
    return seen


def _gpu_remedy() -> str:
    if not tf.test.is_built_with_cuda():
        return (
            "This TensorFlow is built without CUDA: pip install 'digits-trainer[gpu]' (and remove "
            "tensorflow-cpu)."
        )
    if not _has_nvidia_gpu():
        return "There is no NVIDIA device here: in a container, is the GPU passed to it?"
    return "nvidia-smi shows whether the driver works; --tensorflow-logs shows what CUDA said."


def _has_nvidia_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


def _has_tpu(environ: Mapping[str, str], devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Tells whether this is a TPU's own machine, or the environment names a TPU elsewhere."""
    if environ.get("TPU_NAME"):
        return True
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == _GOOGLE and kind in _TPUS:
            return True
    return False


def _multiworker(cluster: Cluster, gpus: Sequence) -> Chosen:
    tfd = tf.distribute
    resolver = tfd.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.workers)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": len(gpus)},
        rpc_layer="grpc",
    )
    members = None if gpus else ring.connect(cluster)  # Before TensorFlow has the port.
    kinds = tfd.experimental.CommunicationImplementation
    strategy = tfd.MultiWorkerMirroredStrategy(
        resolver,
        tfd.experimental.CommunicationOptions(implementation=kinds.NCCL if gpus else kinds.RING),
    )
    if members:
        _reduce_by(members, strategy)
    each = f"{len(gpus)} GPUs by NCCL" if gpus else "one CPU"
    return Chosen(
        strategy,
        f"MultiWorkerMirroredStrategy over {len(cluster.workers)} workers of {each} each: "
        f"{', '.join(cluster.workers)}",
    )


def _reduce_by(members: ring.Ring, strategy: tf.distribute.Strategy) -> None:
    """Has the ring reduce what a strategy's replicas, one on each worker, reduce together."""
    collectives = strategy.extended._cross_device_ops
    theirs = collectives._all_reduce

    def all_reduce(
        reduce_op: tf.distribute.ReduceOp, value: object, replica_id: int, options: object
    ) -> object:
        tensors = tf.nest.flatten(value)
        if any(isinstance(tensor, tf.IndexedSlices) for tensor in tensors):  # of an embedding
            return theirs(reduce_op, value, replica_id, options)
        types = [tensor.dtype for tensor in tensors]
        sums = tf.numpy_function(lambda *own: members.sum(own), tensors, types)
        sums = tf.nest.flatten(sums)  # One is no list outside a tf.function.
        for tensor, total in zip(tensors, sums, strict=True):
            total.set_shape(tensor.shape)
        if reduce_op == tf.distribute.ReduceOp.MEAN:
            sums = [total / members.count for total in sums]
        return tf.nest.pack_sequence_as(value, sums)

    collectives._all_reduce = all_reduce


def _mirrored(gpus: Sequence) -> Chosen:
    devices = tf.config.list_logical_devices("GPU") if gpus else []
    kind = "GPUs"
    if not gpus:
        devices, kind = tf.config.list_logical_devices("CPU"), "logical CPU devices"
        if len(devices) < 2:
            raise ConfigurationError(
                "Expected GPUs for --strategy mirrored. Received: none. "
                f"{_gpu_remedy()} --strategy one trains on the CPU."
            )
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    return Chosen(strategy, f"MirroredStrategy over {len(devices)} {kind}: all that are seen")


def _tpu(environ: Mapping[str, str], timeout: float) -> Chosen:
    # "local" has to be said on a TPU's own machine (googlecolab/colabtools#4699).
    name = environ.get("TPU_NAME") or "local"
    made: queue.SimpleQueue = queue.SimpleQueue()

    def make() -> None:
        try:
            made.put(_connect_tpu(name))
        except Exception as error:  # Of whatever kind: TensorFlow's, a socket's, Google's client's.
            made.put(error)

    # In a thread, because TensorFlow waits without an end for an address that does not answer.
    threading.Thread(target=make, daemon=True).start()
    try:
        strategy = made.get(timeout=timeout)
    except queue.Empty:
        strategy = TimeoutError(f"nothing within {timeout:g} s")
    if isinstance(strategy, Exception):
        reason = " ".join(str(strategy).split())[:200]
        remedy = "Use --strategy one to train without it."
        if "ConfigureDistributedTPU" in str(strategy):
            remedy = (
                "This TensorFlow has no TPU kernels: pip install 'digits-trainer[tpu]' (and remove "
                f"tensorflow). {remedy}"
            )
        raise ConfigurationError(
            f"Expected a TPU that answers, by the name {name}. Received: {reason}. {remedy}"
        ) from strategy
    return Chosen(
        strategy, f"TPUStrategy over {strategy.num_replicas_in_sync} cores of the TPU {name}"
    )


def _connect_tpu(name: str) -> tf.distribute.TPUStrategy:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
    if name != "local":
        tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _layers(layer: keras.Layer) -> list:
    return [layer, *(inner for child in getattr(layer, "layers", []) for inner in _layers(child))]


class _ReplicaSeed:
    """Stands for ``SeedGenerator.next``."""

    def __init__(self, draw: Callable[[bool], tf.Tensor]) -> None:
        self.draw = draw

    def __call__(self, ordered: bool = True) -> tf.Tensor:
        seed = self.draw(ordered)
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return seed
        number = tf.cast(replica.replica_id_in_sync_group, seed.dtype)
        return seed + tf.stack([number * _SEED_STRIDE, tf.zeros_like(number)])
