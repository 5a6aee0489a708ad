"""The version of Gossamer."""

VERSION = "0.1.0"
