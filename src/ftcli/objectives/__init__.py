from ftcli.objectives.causal_lm import CausalLM

Objective = CausalLM  # a union on `kind` as soon as there are two
