"""Rules across the options of a configuration, by subject.

A rule is an `if` whose `yield` says what is wrong as "option: problem; remedy", or is the whole
error. `megatron_dlm.config.validation` calls the functions in order and raises the first refusal.
"""
