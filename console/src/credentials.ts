//! The API key and the app: they come in the page's fragment, which no server sees, and stay in this tab.

import { createStore } from './store';

export interface Credentials {
  key: string;
  app: string;
}

const KEY = 'carillon.key';
const APP = 'carillon.app';

export const credentials = createStore<Credentials>({ key: read(KEY), app: read(APP) || 'demo' });

/** Takes `key` and `app` out of the address bar, so that they are in no screenshot, bookmark or history. */
export function takeCredentials(): void {
  const params = new URLSearchParams(location.hash.replace(/^#/, ''));
  const key = params.get('key');
  const app = params.get('app');
  if (key === null && app === null) return;
  params.delete('key');
  params.delete('app');
  // `view=` back to `view`.
  const rest = params.toString().replace(/=(?=&|$)/g, '');
  history.replaceState(history.state, '', `${location.pathname}${location.search}${rest && `#${rest}`}`);
  setCredentials({ key: key ?? credentials.get().key, app: app ?? credentials.get().app });
}

export function setCredentials(next: Credentials): void {
  try {
    sessionStorage.setItem(KEY, next.key);
    sessionStorage.setItem(APP, next.app);
  } catch {
    // Storage may be switched off: then they last until the page is reloaded.
  }
  credentials.set(next);
}

function read(name: string): string {
  try {
    return sessionStorage.getItem(name) ?? '';
  } catch {
    return '';
  }
}
