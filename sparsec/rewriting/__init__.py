"""rewrite: what a pass is, where passes come from, and the pipeline that runs them."""
