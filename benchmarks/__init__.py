"""fastpcgrad measured against its peers: ``python -m benchmarks.run``, then ``python -m benchmarks.plot``."""
