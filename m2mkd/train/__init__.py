"""How tasks are trained: data, the loop, the stages of a run and its evaluation."""
