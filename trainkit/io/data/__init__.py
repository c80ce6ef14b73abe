"""Data: sources of rows, their order, batches from any position, loaded ahead of the loop."""

from trainkit.io.data.errors import BatchError as BatchError
from trainkit.io.data.errors import DataWarning as DataWarning
from trainkit.io.data.errors import LoadError as LoadError
from trainkit.io.data.loader import Loader as Loader
from trainkit.io.data.mixing import mix as mix
from trainkit.io.data.sources import TokenFile as TokenFile
from trainkit.io.data.sources import row_lengths as row_lengths
from trainkit.io.data.stacking import stack as stack
