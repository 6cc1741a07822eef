"""What the shell takes from megatron-core: names, layer specifications, experts, and replacements on a CPU.

May import: the core, `device`, `job`.
"""

import mimogrid.shell.megatron.names  # noqa: F401 -- first: megatron-core warns when it is imported, and is silenced there
