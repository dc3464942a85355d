//! One GET with JSON in the answer, and errors that say what the server said.

import { CarillonError } from './error.js';

const TIMEOUT_MS = 10_000;

export async function getJson(url: string, options: { bearer?: string; signal?: AbortSignal } = {}): Promise<unknown> {
  const timeout = AbortSignal.timeout(TIMEOUT_MS);
  const signal = options.signal ? AbortSignal.any([options.signal, timeout]) : timeout;
  let response: Response;
  try {
    response = await fetch(url, {
      headers: { accept: 'application/json', ...(options.bearer && { authorization: `Bearer ${options.bearer}` }) },
      signal,
    });
  } catch (cause) {
    throw new CarillonError('unreachable', `no answer from ${url}`, { cause });
  }
  const body = await readJson(response);
  if (response.ok) return body;
  const problem = body && typeof body === 'object' ? (body as Record<string, unknown>) : undefined;
  const says = problem?.['detail'] ?? problem?.['title'] ?? response.statusText;
  throw new CarillonError('http', `${response.status}: ${String(says)}`, { status: response.status, problem });
}

async function readJson(response: Response): Promise<unknown> {
  try {
    return await response.json();
  } catch (cause) {
    if (!response.ok) return undefined;
    throw new CarillonError('http', `${response.url} answered with something other than JSON`, { status: response.status, cause });
  }
}
