"""How fast Octavo is on this machine: what `octavo bench` measures, and what the scripts in benchmarks/ share with it.

    timing   functions in alternation; medians and ranges
    load     what other work took from the machine meanwhile, and so which rounds to distrust
    process  an engine in a process of its own, asked through pipes
    kernels  one token through one matrix, against the memory's bandwidth and PyTorch
    models   prefill and decoding of a whole model, in 8 bits and in float

Example:
    >>> from octavo.bench.timing import spread
    >>> spread([1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 1.0, 'high': 3.0}
"""
