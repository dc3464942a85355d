//! Hash routing: `#view&name=value…`, so that the page works from any path and without a server's help.

import { useEffect, useState } from 'preact/hooks';

import { takeCredentials } from './credentials';

export const VIEWS = ['live', 'users', 'broadcast', 'chat'] as const;
export type View = (typeof VIEWS)[number];

export interface Route {
  view: View;
  params: URLSearchParams;
}

export function parseHash(hash: string): Route {
  const params = new URLSearchParams(hash.replace(/^#/, '').replace('?', '&'));
  const view = VIEWS.find((name) => params.get(name) === '') ?? 'live';
  params.delete(view);
  return { view, params };
}

export function hashOf(view: View, params: Record<string, string> = {}): string {
  const query = new URLSearchParams(params).toString();
  return `#${view}${query && `&${query}`}`;
}

export function useRoute(): Route {
  const [route, setRoute] = useState(() => parseHash(location.hash));
  useEffect(() => {
    const update = () => {
      takeCredentials();
      setRoute(parseHash(location.hash));
    };
    addEventListener('hashchange', update);
    return () => removeEventListener('hashchange', update);
  }, []);
  return route;
}
