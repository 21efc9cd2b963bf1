"""The named tolerances of `torch.testing.assert_close` and `numpy.testing.assert_allclose`.

A wider one needs a reason in words where it is used.
"""

from __future__ import annotations

FP32 = dict(rtol=1e-5, atol=1e-6)
FP64 = dict(rtol=1e-10, atol=1e-12)
EXACT = dict(rtol=0.0, atol=0.0)
# One row against a batch, packed against plain, cached against full: float32 sums in another order.
FORWARD = dict(rtol=1e-4, atol=2e-5)
