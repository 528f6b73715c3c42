"""Real servers that the tests start themselves: one module a server, each on loopback, ended by process id.

A module offers a session-scoped fixture and skips loudly ("NOT TESTED: ...") where its server is not installed;
`make install-test` installs all of them.
"""
