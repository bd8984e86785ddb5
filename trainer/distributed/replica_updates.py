"""The optimizer's update on several replicas: gradients are summed, then each replica updates its
own copies of the variables, by what Keras does on one device.

    update = create(optimizer, variables, strategy)
    strategy.run(lambda x: update(gradients(x)))        # in a tf.function

Keras sums gradients last, in the middle of its update. So each replica clips and checks the
gradients of its own slice of a batch, and what Keras decides inside a condition (accumulation, loss
scaling) cannot meet the other replicas there: TensorFlow refuses it. Summed first, a gradient is
clipped, accumulated and checked as on one device, whatever the optimizer; and the update can be
compiled, since nothing in it waits for another replica.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from trainer.distributed.collectives import all_reduce
from trainer.distributed.replica_variables import optimizers_of
from trainer.runtime import keras, tf

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None
Update: TypeAlias = Callable[[Sequence[Gradient]], None]


def create(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    strategy: tf.distribute.Strategy,
    *,
    jit_compile: bool = False,
) -> Update:
    """Returns the update of a replica, a function of its gradients, None where a variable has none.

    It is called in the replica context, in a traced function.

    Args:
        optimizer: Built on ``variables``, in the strategy's scope.
        variables: The trainable variables, in the order of the gradients.
        strategy: Under TensorFlow's default strategy, and on a TPU, whose step is one program
            anyway, the update is Keras' own.
        jit_compile: Whether to compile the update with XLA, where it is not Keras' own.
    """
    if isinstance(strategy, tf.distribute.TPUStrategy) or strategy is tf.distribute.get_strategy():
        return lambda gradients: optimizer.apply(gradients, variables)
    return _ReplicaUpdate(optimizer, variables, strategy, jit_compile)


class _ReplicaUpdate:
    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        variables: Sequence[keras.Variable],
        strategy: tf.distribute.Strategy,
        jit_compile: bool,
    ) -> None:
        self.optimizer = optimizer
        self.variables = list(variables)
        self.local = strategy.experimental_local_results
        self.alone = tf.distribute.get_strategy()
        self.jit_compile = jit_compile
        self.traced: list[Callable[..., None]] = []

    def __call__(self, gradients: Sequence[Gradient]) -> None:
        present = [number for number, value in enumerate(gradients) if value is not None]
        if not present:
            self.optimizer.apply(gradients, self.variables)  # Does nothing, or raises.
            return
        # Sparse ones (of an embedding) as dense ones: a collective cannot gather another number of
        # rows in the last batch than in those before (TensorFlow 2.21). Optimizers with a state
        # then update all rows, as on Keras' other backends; sparse ones update those of the batch.
        summed = all_reduce(
            tf.distribute.ReduceOp.SUM,
            [tf.convert_to_tensor(gradients[number]) for number in present],
        )
        replica = tf.distribute.get_replica_context()
        replica.merge_call(lambda _, *summed: self._apply(summed, present), args=tuple(summed))

    def _apply(self, summed: Sequence[Gradient], present: Sequence[int]) -> None:
        """Called once for all replicas of this process."""
        replicas = list(zip(*map(self.local, summed), strict=True))
        if not self.traced:
            for number, gradients in enumerate(replicas):
                self.traced.append(self._trace(number, gradients, present))
        copies = self.local(self.variables[0].value)
        for copy, update, gradients in zip(copies, self.traced, replicas, strict=True):
            with tf.device(copy.device):
                update(*gradients)

    def _trace(
        self, number: int, gradients: Sequence[Gradient], present: Sequence[int]
    ) -> Callable[..., None]:
        """Returns what a replica does with its gradients, those that are present."""

        @tf.function(autograph=False, jit_compile=self.jit_compile)
        def update(*gradients: Gradient) -> None:
            placed = dict(zip(present, gradients, strict=True))
            places = range(len(self.variables))
            self.optimizer.apply([placed.get(place) for place in places], self.variables)

        specs = [tf.type_spec_from_value(gradient) for gradient in gradients]
        with (
            self._copies(number),
            # In a thread of its own, since a thread's strategy cannot be left.
            concurrent.futures.ThreadPoolExecutor(1) as thread,
        ):
            return thread.submit(update.get_concrete_function, *specs).result()

    @contextlib.contextmanager
    def _copies(self, number: int) -> Iterator[None]:
        """Puts a replica's copy in the place of each mirrored variable."""
        changed: list[tuple[object, str, object]] = []

        def replace(thing: object, name: str, value: object) -> None:
            changed.append((thing, name, getattr(thing, name)))
            setattr(thing, name, value)

        variables = [*self.variables, *self.optimizer.variables]
        try:
            for variable in {id(variable): variable for variable in variables}.values():
                replace(variable, "_value", self.local(variable._value)[number])
            for optimizer in optimizers_of(self.optimizer):
                # By which it would update the copies of all replicas.
                replace(optimizer, "_distribution_strategy", self.alone)
            yield
        finally:
            for thing, name, value in reversed(changed):
                setattr(thing, name, value)
