//! Client ids. A session that is to survive a closed page needs the same client id when the page comes back.

/** The part of `localStorage` that is needed. */
export interface IdStorage {
  getItem(key: string): string | null;
  setItem(key: string, value: string): void;
}

/**
 * A client id that is the same each time this browser asks for `name`, and that no other browser has:
 * `{name}-{random}`. Kept in `localStorage`. Where there is none (private mode, Node without a `storage`), it is new
 * each time.
 */
export function stableClientId(name: string, storage: IdStorage | undefined = browserStorage()): string {
  const key = `carillon.client-id.${name}`;
  try {
    const kept = storage?.getItem(key);
    if (kept) return kept;
  } catch {
    // Storage can be switched off by the user: then an id for this page alone has to do.
  }
  const id = `${name}-${randomText()}`;
  try {
    storage?.setItem(key, id);
  } catch {
    // As above, or full.
  }
  return id;
}

/** 12 characters of 0–9 a–z; 60 random bits. */
export function randomText(): string {
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => (byte & 31).toString(32)).join('');
}

function browserStorage(): IdStorage | undefined {
  try {
    return typeof localStorage === 'undefined' ? undefined : localStorage;
  } catch {
    return undefined;
  }
}
