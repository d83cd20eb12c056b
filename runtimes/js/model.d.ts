
/** One input or output. A quantized one stores `(real / scale) + zero_point`. */
export interface Tensor {
  name: string;
  shape: number[];
  dtype: string;
  quantization: { scale: number; zero_point: number } | null;
}

/** An opened model, for one caller at a time. */
export declare class Model {
  readonly name: string;
  readonly inputs: Tensor[];
  readonly outputs: Tensor[];
  /** Bytes of memory that the model holds. */
  readonly bytes: number;
  private constructor();
  /** Run once: row-major arrays of the inputs' types and sizes in, new arrays out. Throws SparsecError. */
  run(feeds: Inputs): Outputs;
  /** Copy inputs into the model, which keeps them. */
  set(feeds: Inputs): void;
  /** Run on the inputs that the model has, without copying. */
  step(): void;
  /** Let go of the memory. */
  close(): void;
}

/** Open the artifact in the folder `url`; default: the folder of this file. Throws SparsecError. */
export declare function load(url?: URL | string): Promise<Model>;

/** Which of these WebAssembly features this engine lacks. */
export declare function missingFeatures(needed: string[]): string[];

/** Whatever goes wrong, in one line. */
export declare class SparsecError extends Error {}
