//! What is made for a cluster, as it is written; and whole passes against an API server that is played.

mod api;
mod objects;
mod passes;
