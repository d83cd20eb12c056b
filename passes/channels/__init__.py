"""Units that move together through a network: `rearrange` permutes them, `prune-channels` removes them."""
