"""Container images with encrypted layers as skopeo, containerd and Confidential Containers write them (ocicrypt).

There is no standard but the code of github.com/containers/ocicrypt. Not this project's own format (`encfs.format`),
which can be read lazily and is bound together; this is for exchange with everyone else. The reader is stricter than
theirs: docs/decisions/0010-ocicrypt-strictness.md says how, and why.
"""
