//! MQTT 5.0 §2.4 reason codes that decide something here, and words for those that people get to see.

export const Reason = {
  BadUserNameOrPassword: 0x86,
  NotAuthorized: 0x87,
  SessionTakenOver: 0x8e,
  AdministrativeAction: 0x98,
  UseAnotherServer: 0x9c,
  ServerMoved: 0x9d,
} as const;

const TEXT = new Map<number, string>([
  [0x80, 'the server reports an error'],
  [0x81, 'the server could not read a packet'],
  [0x82, 'the server reports a protocol error'],
  [0x83, 'the server refuses this'],
  [0x84, 'the server does not speak MQTT 5'],
  [0x85, 'the client id is not accepted'],
  [0x86, 'the user name or the token is wrong'],
  [0x87, 'not authorized'],
  [0x88, 'the server is unavailable'],
  [0x89, 'the server is busy'],
  [0x8a, 'banned'],
  [0x8b, 'the server is shutting down'],
  [0x8c, 'the authentication method is not supported'],
  [0x8d, 'the server did not hear from this device in time'],
  [0x8e, 'the same client id has connected elsewhere'],
  [0x8f, 'the topic filter is not valid'],
  [0x90, 'the topic name is not valid'],
  [0x93, 'too many messages in flight'],
  [0x95, 'the packet is too large'],
  [0x96, 'too many messages'],
  [0x97, 'a quota is used up'],
  [0x98, 'ended by an administrator'],
  [0x99, 'the payload is not what its format says'],
  [0x9c, 'the server asks to use another one'],
  [0x9d, 'the server has moved'],
  [0x9f, 'too many connections at once'],
  [0xa0, 'connected for as long as is allowed'],
]);

export function reasonText(code: number): string {
  return TEXT.get(code) ?? `reason code 0x${code.toString(16).padStart(2, '0')}`;
}

/** Codes with which a CONNECT or connection ends so that the same again would end the same. */
const FATAL = new Set<number>([0x84, 0x85, 0x86, 0x87, 0x8a, 0x8c]);

export function isFatal(code: number): boolean {
  return FATAL.has(code);
}
