//! Light, dark, or as the system has it.

import { createStore } from './store';

export type Theme = 'system' | 'light' | 'dark';
const THEMES: readonly Theme[] = ['system', 'light', 'dark'];
const KEY = 'carillon.theme';

export const theme = createStore<Theme>('system');

export function applyTheme(next: Theme = kept()): void {
  document.documentElement.dataset['theme'] = next;
  theme.set(next);
}

export function nextTheme(): void {
  const next = THEMES[(THEMES.indexOf(theme.get()) + 1) % THEMES.length] ?? 'system';
  try {
    localStorage.setItem(KEY, next);
  } catch {
    // Not kept then.
  }
  applyTheme(next);
}

function kept(): Theme {
  try {
    return THEMES.find((name) => name === localStorage.getItem(KEY)) ?? 'system';
  } catch {
    return 'system';
  }
}
