"""What comes in: counts, batches of them, places, random numbers, and the checks at the door.

Also the products over stored entries that everything else is written in. It imports nothing of the
package. Begin with :mod:`~pnmf_pyro.data.counts`, then :mod:`~pnmf_pyro.data.batches`.
"""

from pnmf_pyro.data.batches import Batch, Batches, take
from pnmf_pyro.data.counts import Counts, as_counts

__all__ = ["Batch", "Batches", "Counts", "as_counts", "take"]
