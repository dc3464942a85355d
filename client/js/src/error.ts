//! The one error type of the SDK: what kind of failure, what to read, and whether trying again can help.

/**
 * - `refused`: the server does not accept this device (its token, its name, its rights). Trying again cannot help.
 * - `taken-over`: the same client id connected elsewhere. This connection stays closed, so that the two do not fight.
 * - `kicked`: an administrator ended the session.
 * - `unreachable`: nobody answered. Trying again can help.
 * - `http`: the HTTP API answered with an error; `status` and, if there was one, `problem` say which.
 * - `invalid`: an argument is wrong.
 * - `closed`: this client was closed.
 */
export type ErrorCode = 'refused' | 'taken-over' | 'kicked' | 'unreachable' | 'http' | 'invalid' | 'closed';

export class CarillonError extends Error {
  readonly code: ErrorCode;
  /** MQTT 5.0 §2.4 reason code, when the gateway gave one. */
  readonly reasonCode: number | undefined;
  /** HTTP status, for `http`. */
  readonly status: number | undefined;
  /** The problem document (RFC 9457), for `http`. */
  readonly problem: Record<string, unknown> | undefined;

  constructor(
    code: ErrorCode,
    message: string,
    detail: {
      reasonCode?: number | undefined;
      status?: number;
      problem?: Record<string, unknown> | undefined;
      cause?: unknown;
    } = {},
  ) {
    super(message, { cause: detail.cause });
    this.name = 'CarillonError';
    this.code = code;
    this.reasonCode = detail.reasonCode;
    this.status = detail.status;
    this.problem = detail.problem;
  }

  /** Can the same call succeed later? */
  get retryable(): boolean {
    return this.code === 'unreachable' || (this.code === 'http' && (this.status === 429 || (this.status ?? 0) >= 500));
  }
}
