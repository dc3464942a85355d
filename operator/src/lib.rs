//! The operator: custom resources in, running pods out, and every change to those safe for who is connected to them.
