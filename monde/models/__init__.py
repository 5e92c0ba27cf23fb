"""Models of transformers on monde: families, loading, offloading.

Importing it registers monde with transformers.
"""

from monde.models import interface, quantizer

interface.register()
quantizer.register()
