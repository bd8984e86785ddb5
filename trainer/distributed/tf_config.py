"""Sets TF_CONFIG for a program that is not this package's, from the variables of an Indexed Job.

The image imports it in every Python process of a run of several workers (``tf_config.pth``), so
that a stock script finds what TensorFlow's strategies read, however many pods there are. A manifest
could not say it: there is no loop over the pods' names in a variable of Kubernetes.
"""

import itertools
import os
import sys
from collections.abc import MutableMapping, Sequence

from trainer.distributed.cluster import described
from trainer.errors import ConfigurationError


def set_tf_config(environ: MutableMapping[str, str], argv: Sequence[str]) -> None:
    """Sets TF_CONFIG where ``trainer.distributed.cluster`` finds several workers in an environment
    that has none yet.

    Args:
        environ: The environment of the process.
        argv: Its command line, as ``sys.orig_argv``. The commands of this package read the
            variables themselves, and say what is wrong with them.

    Raises:
        ConfigurationError: The variables are malformed.
    """
    module = next((after for flag, after in itertools.pairwise(argv) if flag == "-m"), "")
    if module.startswith("trainer.") or "TF_CONFIG" in environ:
        return
    if cluster := described(environ):
        environ["TF_CONFIG"] = cluster.tf_config


def set_or_exit() -> None:
    """Sets TF_CONFIG in this process, or ends it: each worker would train a model of its own."""
    try:
        set_tf_config(os.environ, sys.orig_argv)
    except ConfigurationError as error:
        print(f"tf_config: error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # What a .pth file raises is only printed.
