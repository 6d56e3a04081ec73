"""Kernel Hub projects; the modules live in ``kernels/<name>/torch-ext/`` at the root of a checkout."""

from hf_efficiency._layout import checkout_paths

__path__ += checkout_paths("kernels/*/torch-ext")
