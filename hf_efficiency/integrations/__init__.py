"""Glue to the host libraries; the modules live in ``integrations/`` at the root of a checkout."""

from hf_efficiency._layout import checkout_paths

__path__ += checkout_paths("integrations")
