//! Keys of our advisory locks: two numbers each, drawn once by lot, so that no application takes one by accident. `sql/api/15_locks.sql`
//! has the same numbers, for what the server itself takes, and for people: the view `build_advisory_locks` says what each of them is.
//! Nobody waits for such a lock: all are tried, and whoever cannot have one goes on, or says who has it.

/// An advisory lock of two keys.
pub type Key = (i32, i32);

/// Of a claim: one of its builder's slots, `(SLOT.0 + builders.number, SLOT.1 + slot)`.
pub const SLOT: Key = (733_512_904, 417_066_218);
/// Of a claim: a unit of a lock, `(UNIT.0 + build_locks.number, UNIT.1 + unit)`.
pub const UNIT: Key = (1_233_512_904, 958_204_351);
/// Of the watch session: the worker's name, `(NAME, hashtext(name))`.
pub const NAME: i32 = 2_041_775_263;
/// Of a person's UPDATE or DELETE that may wait for a worker, shared: `(ASK, process id of the session)`.
pub const ASK: i32 = 2_041_775_265;
/// Of a daemon that counts the mails of an address: `(ADDRESS, hashtext(lower(address)))`.
pub const ADDRESS: i32 = 2_041_775_266;
/// Of `migrate`.
pub const MIGRATE: Key = (2_041_775_267, 318_804_951);
/// Of a round of `[retention]`.
pub const RETENTION: Key = (2_041_775_267, 318_804_952);
