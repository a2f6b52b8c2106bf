"""`dmh doctor`: what this machine allows, what each fact means for dmh, and how to change it.

Owns the words.  The facts come from `dmh.machine` and the idle sources, what is a must from
`dmh.service.requirements`: nothing is probed or judged twice.  Called by `dmh.cli.doctor`.
"""
