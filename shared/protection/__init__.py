"""What guards bytes between sites and server: keys, signed statements, and the sealed envelope of a reply.

    keys        key pairs in files that only their owner reads, and fingerprints that people compare
    statements  short signed texts: who is in a federation, and which keys are in force
    sealed      HPKE and a signature around what leaves a site; a signature on what comes down
    certificates  the federation's own certificate authority and the server's TLS certificate

All of it is `cryptography`'s; here is only what is signed with what, and the written formats (docs/protocol.md).
"""
