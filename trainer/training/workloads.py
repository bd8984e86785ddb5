"""Which workload a run is, by its data and its network.

    workload = load(config)             # imports TensorFlow for images that are no digits

``Digits`` on the network for digits have a training step and kernels of their own
(``digits_workload``); all else is trained as ``trainer.fit`` does it (``model_workload``).
"""

from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.data.digits import Digits
from trainer.errors import UsageError
from trainer.training.workload import Workload

if TYPE_CHECKING:
    from trainer.data.dataset import Splits


def load(config: TrainConfig, data: "Digits | Splits | None" = None) -> Workload:
    """Loads the data of a run.

    Args:
        config: The run's.
        data: Images to train on; None: those that ``config.data`` names.

    Raises:
        UsageError: A limit, a split or the batch size does not fit their number.
        TrainerError: As ``sources.load`` raises it.
    """
    from trainer.data import sources

    source: Digits | Splits = (
        sources.load(config.data, image_size=config.height_and_width, skip_bad=config.skip_bad)
        if data is None
        else data
    )
    workload: Workload
    if isinstance(source, Digits) and config.model == "cnn":
        from trainer.training.digits_workload import DigitsWorkload

        workload = DigitsWorkload(config, source)
    else:
        from trainer.training.model_workload import ModelWorkload

        workload = ModelWorkload(config, source)
    if config.early_stopping and "validation_examples" not in workload.data:
        raise UsageError(
            "early_stopping takes validation images: the test images judge the model afterwards. "
            f"Received: {config.data}, without any. Use validation_split=0.1, for example."
        )
    if config.batch_size > workload.train_examples:
        raise UsageError(
            f"batch_size must be at most the {workload.train_examples} training images. Received: "
            f"batch_size={config.batch_size}. Use batch_size={workload.train_examples} or less."
        )
    return workload
